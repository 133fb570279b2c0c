"""Rollouts: a policy meets an environment, and what happened becomes a batch."""
