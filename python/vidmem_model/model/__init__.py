"""The memory encoders, the DiT that reads their tokens, and all of it together."""
