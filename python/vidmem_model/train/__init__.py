"""Training of the memory (Stage I), of its continuation (Stage II) and of the VAE."""
