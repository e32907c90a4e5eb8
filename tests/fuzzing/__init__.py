"""The parts of tests/fuzz.py: drawing cases, what their results must be and how far off they may be, running them."""
