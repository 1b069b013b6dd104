"""Plumbing: what any package uses. It knows no task, map, plan or method."""
