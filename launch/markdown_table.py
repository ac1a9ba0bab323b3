"""Tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, with a column for each name; a row may lack some."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
