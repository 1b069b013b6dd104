"""Pictures of conflict maps."""
