"""What runs in every step of a branched model: values that differ between groups of tasks."""
