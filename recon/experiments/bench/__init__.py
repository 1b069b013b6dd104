"""Several trainings of a problem, compared at the end."""
