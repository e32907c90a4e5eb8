"""Sparse memory gathering: read, write, select and store rows of a token memory."""
