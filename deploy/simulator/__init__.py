"""The live code on virtual time over twins, and what is told of a run."""
