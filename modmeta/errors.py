"""The one kind of error that a user can cause, and the nearest right name to offer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches


class ModmetaError(Exception):
    """Bad input: what is wrong, where, and what to do about it, in one line.

    The command line prints the message without a traceback and exits with 2.
    """


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice that looks most like ``name``, or None when none is close."""
    by_folded = {choice.casefold(): choice for choice in choices}
    found = get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def unknown(noun: str, name: str, choices: Iterable[str], where: str = "") -> ModmetaError:
    """Build the error for a name that is not one of ``choices``.

    Args:
        noun: what the name stands for, such as ``"domain"``.
        name: the name that was not found.
        choices: the names that exist.
        where: an optional place, such as a file, that the message should name.
    """
    known = sorted(choices)
    close = nearest(name, known)
    if close is not None:
        advice = f"did you mean {close!r}?"
    else:
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        advice = f"known: {shown}" if known else "none is known here"
    place = f" in {where}" if where else ""
    return ModmetaError(f"unknown {noun} {name!r}{place}; {advice}")


def refuse_outside(numbers: Mapping[str, float], low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Refuse arguments that are not finite or not in a range.

    Args:
        numbers: the arguments by their names.
        low: the least that is allowed.
        high: the most that is allowed.
        above: whether ``low`` itself is not allowed.

    Raises:
        ModmetaError: naming the argument, its value and the range.
    """
    for name, value in numbers.items():
        if math.isfinite(value) and low <= value <= high and not (above and value == low):
            continue
        if high < math.inf:
            allowed = f"must lie in {low:g}..{high:g}" + (f", above {low:g}" if above else "")
        elif low > -math.inf:
            allowed = f"must be finite and above {low:g}" if above else f"must be finite and {low:g} or more"
        else:
            allowed = "must be finite"
        raise ModmetaError(f"{name} {allowed}, got {value}")
