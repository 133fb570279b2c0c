"""Rewards: functions written by users, and what becomes of what they pay."""
