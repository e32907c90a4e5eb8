"""How well memories give frames back."""
