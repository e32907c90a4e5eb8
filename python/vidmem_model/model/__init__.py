"""The trained model: memory encoders, text encoder, and the DiT that reads their tokens."""
