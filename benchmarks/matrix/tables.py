"""The same rows as a table in the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from modmeta.evaluation.terminal import console
from modmeta.files import write_atomically


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to the terminal."""
    table = Table(title=title)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def between(page: str, name: str, text: str) -> str:
    """Return a Markdown page with what stands between the marks ``name: begin`` and ``name: end`` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def save(folder: Path | None, name: str, text: str, data: Any) -> None:
    """Write ``name.md`` and ``name.json`` to ``folder``, if one is given."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.md", text.encode())
    write_atomically(folder / f"{name}.json", json.dumps(data, indent=1, allow_nan=False).encode())
