"""Schedules for CPUs: which are worth trying, and the fastest of them."""

from .search import BUDGET, CpuTuner

__all__ = ["BUDGET", "CpuTuner"]
