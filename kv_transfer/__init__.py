"""How KV blocks move between instances."""
