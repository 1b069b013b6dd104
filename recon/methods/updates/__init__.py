"""One step: the losses or the gradients of the tasks become one update."""
