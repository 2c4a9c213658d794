"""Schedules for CPUs: which are worth trying, and the fastest of them."""

from .search import CpuTuner

__all__ = ["CpuTuner"]
