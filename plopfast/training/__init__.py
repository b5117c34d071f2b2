"""Training: the step, its loss and state, evaluation, and what a step costs."""
