"""Measure memory and time against the length of the history."""
