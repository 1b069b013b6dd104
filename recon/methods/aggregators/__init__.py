"""Methods that combine the gradients of the tasks."""
