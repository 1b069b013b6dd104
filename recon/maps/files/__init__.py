"""The conflict map file."""
