"""Training: the loop, the update, checkpoints, metrics. Knows policies and rollouts by their protocols alone."""
