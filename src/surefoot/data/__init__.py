"""Rows, examples and preferences: what is read, and how it becomes tokens."""
