"""Who serves a request, and when."""
