"""How sure the scores of a conflict map are."""
