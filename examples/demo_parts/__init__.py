"""The parts of `examples/demo.py`, one file each."""
