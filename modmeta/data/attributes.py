"""What classes are like, in numbers: one row of attributes per class, from a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmeta.errors import ModmetaError, unknown

FIRST_COLUMN = "class"


@dataclass(frozen=True)
class ClassAttributes:
    """A vector of attributes for each class.

    Attributes:
        classes: names of the classes.
        names: names of the attributes.
        values: ``(C, A)``, finite.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    values: Tensor

    def of(self, classes: Sequence[str]) -> Tensor:
        """Return the vectors ``(len(classes), A)`` of some classes.

        Raises:
            ModmetaError: for a class without one.
        """
        index = {name: row for row, name in enumerate(self.classes)}
        for name in classes:
            if name not in index:
                raise unknown("class", name, self.classes, "the attributes")
        return self.values[[index[name] for name in classes]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"classes": list(self.classes), "names": list(self.names), "values": self.values}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> ClassAttributes:
        """Rebuild what :meth:`to_dict` returned."""
        return cls(tuple(state["classes"]), tuple(state["names"]), state["values"])


def read_attributes(path: str) -> ClassAttributes:
    """Read a CSV file: a column ``class`` with the classes' names, then one column of numbers per attribute.

    Args:
        path: the file, or the word ``digits`` for the attributes of the embedded digits: the segments of a
            seven-segment display, and counts of loops, free ends and straight strokes.

    Raises:
        ModmetaError: naming the line and column that is wrong.
    """
    try:
        packaged = files("modmeta.data").joinpath("digits_attributes.csv")
        content = packaged.read_bytes() if path == "digits" else Path(path).read_bytes()
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    except OSError as error:
        raise ModmetaError(f"attributes: {path} cannot be read ({error.strerror}); name a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ModmetaError(f"attributes: {path} is no CSV file in UTF-8 ({error}); save it as one") from error
    numbered = [(line, [cell.strip() for cell in row]) for line, row in enumerate(rows, start=1) if any(row)]
    if len(numbered) < 2:
        raise ModmetaError(f"attributes: {path} has no classes; give a header and one line per class")
    names = _header(path, numbered[0][1])
    found: dict[str, list[float]] = {}
    for line, (name, *cells) in numbered[1:]:
        where = f"attributes: {path}, line {line}"
        if len(cells) != len(names):
            own, wanted = len(cells) + 1, len(names) + 1
            raise ModmetaError(f"{where}: {own} columns, and the header has {wanted}; make them agree")
        if not name:
            raise ModmetaError(f"{where}: the class has no name; give it that of its folder")
        if name in found:
            raise ModmetaError(f"{where}: class {name!r} is there twice; remove one of the lines")
        found[name] = [_number(f"{where}, column {column!r}", cell) for column, cell in zip(names, cells, strict=True)]
    return ClassAttributes(tuple(found), names, torch.tensor(list(found.values()), dtype=torch.float32))


def _header(path: str, header: list[str]) -> tuple[str, ...]:
    first, *names = header
    if first != FIRST_COLUMN or not names:
        raise ModmetaError(
            f"attributes: {path} must begin with a header {FIRST_COLUMN},ATTRIBUTE,... with commas, and begins with "
            f"{','.join(header)[:60]!r}"
        )
    for name in names:
        if not name or names.count(name) > 1:
            raise ModmetaError(f"attributes: {path}: {names.count(name)} columns are named {name!r}; make it one")
    return tuple(names)


def _number(where: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    # A number that single precision cannot hold is of no use either.
    if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
        raise ModmetaError(f"{where}: {cell!r} is no finite number; fill it in, or drop the column")
    return value
