"""Memories of a clip: three methods behind one interface, and their file."""
