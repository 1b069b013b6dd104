"""Gradients folded into a few numbers, as they are made."""
