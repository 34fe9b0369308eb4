"""Measures engines, servers and kernels into latency profiles."""
