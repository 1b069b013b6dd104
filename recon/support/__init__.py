"""Plumbing for all packages: networks, files, processes, text. It knows no task, map, plan or method."""
