"""Which schedule a problem gets: candidates as data, timed, replayed from a database, or predicted."""

from .database import Database, default_path
from .tuner import Tuned, Tuner

__all__ = ["Database", "Tuned", "Tuner", "default_path"]
