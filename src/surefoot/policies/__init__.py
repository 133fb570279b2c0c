"""Policies: modules that act, evaluate what was done, and value where they stand."""
