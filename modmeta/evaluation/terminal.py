"""The terminal that tables are printed to."""

from __future__ import annotations

from rich.console import Console

_PIPE_WIDTH = 120


def console() -> Console:
    """Return a console; a pipe or a log file, which has no width, gets room enough for a table."""
    found = Console()
    return found if found.is_terminal else Console(width=_PIPE_WIDTH)
