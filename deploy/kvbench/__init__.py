"""`pdserve kvbench`: how fast KV moves between two processes of this machine."""
