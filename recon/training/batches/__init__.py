"""Batches: how they come, in which order, and which tasks they hold."""
