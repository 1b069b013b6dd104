"""One training of a problem, with its folder."""
