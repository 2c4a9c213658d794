"""Schedules for GPUs: which are worth trying, and which is predicted to be the fastest."""
