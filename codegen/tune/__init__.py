"""Which schedule a problem gets: candidates as data, timed, replayed from a database, or predicted."""

from .cpu import BUDGET, CpuTuner
from .database import Database, default_path

__all__ = ["BUDGET", "CpuTuner", "Database", "default_path"]
