"""Which schedule a problem gets: candidates as data, timed, replayed from a database, or predicted."""

from .database import Database, default_path
from .gpu import Fleet, parse_fleet, serve
from .tuner import Tuned, Tuner

__all__ = ["Database", "Fleet", "Tuned", "Tuner", "default_path", "parse_fleet", "serve"]
