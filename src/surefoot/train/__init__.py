"""The loop, updates of an objective, checkpoints, gates and metrics. Knows no task and no kind of policy."""
