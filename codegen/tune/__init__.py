"""Which schedule a problem gets: candidates as data, timed here or replayed from a database."""

from .database import Database, default_path
from .search import BUDGET, Tuner

__all__ = ["BUDGET", "Database", "Tuner", "default_path"]
