"""Policies for Gymnasium environments."""
