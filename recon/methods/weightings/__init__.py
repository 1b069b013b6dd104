"""Methods that weigh the losses of the tasks."""
