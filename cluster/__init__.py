"""What a cluster is and what an instance in it is; imports none of our other packages."""
