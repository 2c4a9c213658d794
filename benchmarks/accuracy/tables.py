"""Markdown of accuracy measurements: the metric against the sparsity, one table a model.

    python benchmarks/accuracy/tables.py FILE.json ...       # files with a list of rows, alone or as their "rows"

A row has the model's name, the method, the pattern, the sparsity (0 to 1), the metric and that of the dense model (0 to
1). Its column is `sparsity_asked` where it has one; a cell whose measured sparsity is a point or more off says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def asked(row: Row) -> float:
    """The sparsity that heads the row's column, 0 to 1, in whole points."""
    return round(float(row["sparsity_asked"] if "sparsity_asked" in row else row["sparsity"]), 2)


def cell(row: Row) -> str:
    """The metric in hundredths, and the sparsity where it is not the column's."""
    off = abs(row["sparsity"] - asked(row)) >= 0.01
    return f"{100 * row['metric']:.1f}" + (f" ({row['sparsity']:.0%} zeros)" if off else "")


def table(rows: list[Row]) -> str:
    """One model's table: a line for each method and pattern, in the order of the rows."""
    columns = sorted({asked(row) for row in rows})
    dense = ", ".join(f"{100 * value:.1f}" for value in dict.fromkeys(row["dense"] for row in rows))
    text = [
        f"| {rows[0]['model']}, dense {dense} | {' | '.join(f'{column:.0%}' for column in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for line in dict.fromkeys((row["method"], row["pattern"]) for row in rows):
        cells = {asked(row): cell(row) for row in rows if (row["method"], row["pattern"]) == line}
        text.append(f"| {', '.join(line)} | {' | '.join(cells.get(column, '-') for column in columns)} |")
    return "\n".join(text)


def tables(rows: list[Row]) -> str:
    """Every model's tables, single weights and blocks apart, in the order of the rows."""
    found = dict.fromkeys((row["model"], row["pattern"] == "unstructured") for row in rows)
    return "\n\n".join(
        table([row for row in rows if (row["model"], row["pattern"] == "unstructured") == key]) for key in found
    )


def labelled(record: Any) -> list[Row]:
    """The rows of a file; methods of another tool have its name before theirs."""
    if isinstance(record, list):
        return record
    tool = "onnxsim " if "onnxsim" in record.get("versions", {}) else ""
    return [{**row, "method": tool + row["method"]} for row in record["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--pattern", help="only rows of patterns that begin so")
    options = parser.parse_args()
    rows = [row for file in options.files for row in labelled(json.loads(file.read_text()))]
    print(tables([row for row in rows if row["pattern"].startswith(options.pattern or "")]))


if __name__ == "__main__":
    main()
