"""One check, from the first batches to the report."""
