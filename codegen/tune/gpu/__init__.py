"""Schedules for GPUs: which are worth trying, and which is or is predicted to be the fastest."""

from .fleet import Fleet, parse_fleet, serve
from .search import Choice, GpuTuner

__all__ = ["Choice", "Fleet", "GpuTuner", "parse_fleet", "serve"]
