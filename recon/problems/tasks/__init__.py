"""Losses and metrics that several problems share."""
