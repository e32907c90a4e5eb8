"""Training: the memory (Stage I), continuation (Stage II) and the VAE."""
