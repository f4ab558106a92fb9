"""The action table: what a fixed set of actions did to the query loss of logged episodes, as Parquet files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modmeta.adaptation import IndicatorSet
from modmeta.adapters import Unit
from modmeta.errors import ModmetaError
from modmeta.files import write_atomically

_HEADER = b"modmeta"
_SCALARS = ("nll", "tempered_nll", "accuracy", "backward_macs")
_HALVES = ("half_nll", "half_tempered_nll", "half_accuracy")


@dataclass(frozen=True)
class Action:
    """One row of a plan's decisions: gates ``(U,)``, rates ``(U,)`` of every step, factor on the head's ridge."""

    name: str
    gates: tuple[float, ...]
    rates: tuple[float, ...]
    ridge: float

    @property
    def idle(self) -> bool:
        """Whether it is the unadapted model as it is."""
        return not any(self.gates) and self.ridge == 1.0


@dataclass(frozen=True)
class ActionTable:
    """``E`` logged episodes by ``A`` actions.

    Attributes:
        header: what the numbers are of; see :func:`describe`.
        actions: the actions, the idle one among them.
        episodes: ``(E,)`` numbers of the episodes within their split.
        domains: ``(E,)`` their domains; ``shots`` and ``ways`` likewise.
        whole: ``(E, G)`` global indicators, raw.
        each: ``(E, U, F)`` indicators per unit, raw.
        figures: by column ``(E, A)``, or ``(E, A, 2)`` for those of the two halves of the query.
    """

    header: dict[str, Any]
    actions: tuple[Action, ...]
    episodes: tuple[int, ...]
    domains: tuple[str, ...]
    shots: Tensor
    ways: Tensor
    whole: Tensor
    each: Tensor
    figures: dict[str, Tensor]

    @property
    def idle(self) -> int:
        """Index of the idle action."""
        return next(index for index, action in enumerate(self.actions) if action.idle)

    def check(self, units: Sequence[Unit], indicators: IndicatorSet, steps: int) -> None:
        """Refuse a table of other units, indicators or steps.

        Raises:
            ModmetaError: saying what the table is of, and what is wanted.
        """
        found, wanted = _compared(self.header), _compared(describe(units, indicators, steps))
        for key, value in wanted.items():
            if found[key] != value:
                raise ModmetaError(
                    f"the action table is of other {key}: it has {_brief(found[key])}, this learner {_brief(value)}; "
                    f"log one with this configuration"
                )


def describe(units: Sequence[Unit], indicators: IndicatorSet, steps: int) -> dict[str, Any]:
    """Return what a table must agree with to be of use to a learner, as plain data."""
    return {
        "units": [
            {"name": u.name, "depth": u.depth, "learns": u.learns, "reads": u.reads, "rate": u.rate} for u in units
        ],
        "indicators": {
            "global": ["/".join(number) for number in indicators.numbers(per_unit=False)],
            "unit": ["/".join(number) for number in indicators.numbers(per_unit=True)],
        },
        "steps": steps,
    }


def indicator_columns(header: Mapping[str, Any]) -> list[str]:
    """Return the names of the indicator columns: the global ones, then unit by unit."""
    indicators = header["indicators"]
    return [*indicators["global"], *(f"{u['name']}/{number}" for u in header["units"] for number in indicators["unit"])]


def part_file(folder: Path, part: int) -> Path:
    """Return the path of a part."""
    return folder / f"part-{part:05d}.parquet"


def write_part(path: Path, rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> None:
    """Write the rows of some whole episodes to one Parquet file, whole or not at all.

    Raises:
        ModmetaError: if pyarrow is missing, or the file cannot be written.
        ValueError: if a number is not finite.
    """
    arrow, parquet = _pyarrow()
    numbers, lists = arrow.float64(), arrow.list_(arrow.float64())
    whole = dict.fromkeys(("episode", "shots", "ways", "backward_macs"), arrow.int64())
    words = dict.fromkeys(("domain", "shift", "action"), arrow.string())
    kinds = whole | words | dict.fromkeys(("gates", "rates", *_HALVES), lists)
    for row in rows:
        flat = np.hstack([np.ravel(value) for name, value in row.items() if name not in words])
        if not np.isfinite(flat.astype(float)).all():
            raise ValueError(f"episode {row['episode']}, action {row['action']!r}: a number is not finite")
    schema = arrow.schema([(name, kinds.get(name, numbers)) for name in rows[0]])
    table = arrow.Table.from_pylist(list(rows), schema=schema.with_metadata({_HEADER: json.dumps(header)}))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return what a part is of, and how many rows it has.

    Raises:
        ModmetaError: if it is no part of an action table.
    """
    arrow, parquet = _pyarrow()
    try:
        file = parquet.ParquetFile(io.BytesIO(path.read_bytes()))
        return json.loads((file.schema_arrow.metadata or {})[_HEADER]), file.metadata.num_rows
    except (OSError, arrow.ArrowException, KeyError, ValueError) as error:
        raise ModmetaError(f"{path} is no part of an action table; delete it, or give another folder") from error


def read_table(folder: str | Path) -> ActionTable:
    """Read all parts of an action table.

    Raises:
        ModmetaError: if there is none, it is broken, or its parts are not of one table.
    """
    _, parquet = _pyarrow()
    paths = sorted(Path(folder).glob("part-*.parquet"))
    if not paths:
        raise ModmetaError(f"{folder} holds no action table (part-00000.parquet, ...); log one with an action grid")
    headers = [read_header(path)[0] for path in paths]
    for path, header in zip(paths, headers, strict=True):
        if header != headers[0]:
            raise ModmetaError(f"{path} is of another table than {paths[0].name}; keep each table in its own folder")
    try:
        # From bytes: a path would let the folders' names add columns.
        parts = [_columns(parquet.read_table(io.BytesIO(path.read_bytes()))) for path in paths]
        return _assemble(headers[0], {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    except Exception as error:  # a damaged file may fail anywhere in between
        reason = " ".join(str(error).split())[:120]
        raise ModmetaError(f"the action table in {folder} is malformed ({reason}); log it again") from error


def _assemble(header: dict[str, Any], columns: Mapping[str, np.ndarray]) -> ActionTable:
    count = len(header["actions"])
    total = len(columns["episode"])
    if not total or total % count:
        raise ValueError(f"{total} rows for {count} actions")
    actions = tuple(Action(a["name"], tuple(a["gates"]), tuple(a["rates"]), a["ridge"]) for a in header["actions"])
    names = columns["action"].reshape(-1, count)
    episodes = columns["episode"].reshape(-1, count)
    if (names != [action.name for action in actions]).any() or (episodes != episodes[:, :1]).any():
        raise ValueError("its rows are not every action of one episode after the other")
    if len(set(episodes[:, 0].tolist())) != len(episodes):
        raise ValueError("an episode is there twice")
    if not any(action.idle for action in actions):
        raise ValueError("no action leaves the model as it is")

    def of_episode(name: str) -> np.ndarray:
        return columns[name].reshape(-1, count)[:, 0]

    units, width = len(header["units"]), len(header["indicators"]["global"])
    shown = [of_episode(name).astype(float) for name in indicator_columns(header)]
    indicators = torch.from_numpy(np.stack([np.zeros(len(episodes)), *shown], axis=1)[:, 1:])
    figures = {name: torch.from_numpy(columns[name].astype(float).reshape(-1, count)) for name in _SCALARS}
    figures |= {name: torch.from_numpy(columns[name].reshape(-1, count, 2)) for name in _HALVES}
    for name, values in {"indicators": indicators, **figures}.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"its {name} hold a number that is not finite")
    return ActionTable(
        header=header,
        actions=actions,
        episodes=tuple(episodes[:, 0].tolist()),
        domains=tuple(of_episode("domain").tolist()),
        shots=torch.from_numpy(of_episode("shots").astype(np.int64)),
        ways=torch.from_numpy(of_episode("ways").astype(np.int64)),
        whole=indicators[:, :width].float(),
        each=indicators[:, width:].unflatten(1, (units, -1)).float(),
        figures=figures,
    )


def _columns(table: Any) -> dict[str, np.ndarray]:
    """Return the columns of a part; lists become rows of numbers."""
    found = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        nested = hasattr(column, "flatten") and str(column.type).startswith("list")
        found[name] = (column.flatten() if nested else column).to_numpy(zero_copy_only=False)
        if nested:
            found[name] = found[name].reshape(table.num_rows, -1)
    return found


def _compared(header: Mapping[str, Any]) -> dict[str, Any]:
    indicators = [*header["indicators"]["global"], *header["indicators"]["unit"]]
    return {"units": [u["name"] for u in header["units"]], "indicators": indicators, "steps": header["steps"]}


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ModmetaError("an action table is Parquet; pip install 'modmeta[grid]' to write or read one") from error
    return pyarrow, pyarrow.parquet
