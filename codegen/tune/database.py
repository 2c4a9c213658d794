"""What was measured once, in SQLite, replayed ever after."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_CREATE = "CREATE TABLE IF NOT EXISTS records (kind TEXT, key TEXT, value TEXT, PRIMARY KEY (kind, key))"


class Database:
    """Records of plain data by kind ("schedule", "comparison") and key, a text that names all they depend on.

    A database that cannot be opened, is damaged or is locked for long is as good as an empty one: things are then
    measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, kind: str, key: str) -> dict[str, Any] | None:
        """The record, or None."""
        for connection in self._open():
            row = connection.execute("SELECT value FROM records WHERE kind = ? AND key = ?", (kind, key)).fetchone()
            if row is not None:
                value: dict[str, Any] = json.loads(row[0])
                return value
        return None

    def store(self, kind: str, key: str, value: dict[str, Any]) -> None:
        """Keep a record; the newer one of two stays."""
        for connection in self._open():
            with connection:
                connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (kind, key, json.dumps(value)))

    def count(self) -> int:
        """Number of records."""
        for connection in self._open():
            return int(connection.execute("SELECT count(*) FROM records").fetchone()[0])
        return 0

    def _open(self) -> Iterator[sqlite3.Connection]:
        """One connection for one statement, or none where the file cannot be used."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=10)) as connection:
                connection.execute(_CREATE)
                yield connection
        except (sqlite3.Error, OSError):
            return


def default_path() -> Path:
    """`tuning.sqlite` in the user's cache folder."""
    from platformdirs import user_cache_path

    return user_cache_path("sparsec", appauthor=False) / "tuning.sqlite"
