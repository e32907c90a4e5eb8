"""Evaluate how well memories reconstruct frames."""
