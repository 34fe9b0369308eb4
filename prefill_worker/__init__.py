"""What is special about an instance that prefills."""
