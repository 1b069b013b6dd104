"""Base classes of the gradient methods."""
