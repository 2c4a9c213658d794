"""Schedules for GPUs: which are worth trying, and which is or is predicted to be the fastest."""

from .search import Choice, GpuTuner

__all__ = ["Choice", "GpuTuner"]
