"""The gradients of the tasks in one step."""
