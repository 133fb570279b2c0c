"""For those who come from TRL: its settings and its value-head checkpoints, made ours."""
