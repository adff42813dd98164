"""Tests, checks and timings of the CUDA kernels on a card, in one command: see `__main__`."""
