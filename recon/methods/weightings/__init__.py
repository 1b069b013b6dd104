"""Methods that weight losses."""
