"""Rewards: functions written by users, and what is done to their scores."""
