"""The space of a study: which keys of a configuration vary, and between what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from modmeta.errors import ModmetaError, unknown

Space = dict[str, BaseDistribution]
"""By dotted key what its value is drawn from. Choices are kept as JSON texts, so that they may be of any kind."""

_OPTIONS = ("low", "high", "log", "step")


def read_space(content: Any, where: str) -> Space:
    """Return the space that a file describes.

    ``{low: A, high: B}`` is a range, of whole numbers where both are, with ``log: true`` for a logarithmic scale or
    ``step: S`` for a grid; a list holds choices.

    Args:
        content: what is in the file.
        where: its name, for messages.

    Raises:
        ModmetaError: naming the key whose description cannot be used.
    """
    if not isinstance(content, dict) or not content:
        raise ModmetaError(f"space: {where} names no key, such as `model.init_args.steps: {{low: 1, high: 5}}`")
    space: Space = {}
    for key, value in content.items():
        try:
            space[str(key)] = _choices(value) if isinstance(value, list) else _range(value)
        except (TypeError, ValueError) as error:
            raise ModmetaError(f"space: {key} in {where}: {error}") from error
    return space


def check_keys(space: Space, config: Mapping[str, Any], where: str) -> None:
    """Refuse keys that a configuration does not have, and such that stand within each other.

    Args:
        space: the keys.
        config: a configuration with all its defaults.
        where: the space's file, for messages.

    Raises:
        ModmetaError: with the nearest key there is.
    """
    known = list(_keys(config))
    for key in space:
        if key not in known:
            raise unknown("key", key, known, where)
        outer = next((other for other in space if key.startswith(f"{other}.")), None)
        if outer is not None:
            raise ModmetaError(f"space: {key} in {where} is a part of {outer}, which varies as a whole; leave out one")


def lowest(space: Space) -> dict[str, Any]:
    """Return for each key the lower end of its range, or its first choice."""
    return {
        key: json.loads(each.choices[0]) if isinstance(each, CategoricalDistribution) else each.low  # type: ignore
        for key, each in space.items()
    }


def from_optuna(space: Space, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of keys for Optuna's parameters."""
    choice = CategoricalDistribution
    return {key: json.loads(parameters[key]) if isinstance(space[key], choice) else parameters[key] for key in space}


def to_optuna(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return Optuna's parameters for values of keys."""
    choice = CategoricalDistribution
    return {key: json.dumps(values[key]) if isinstance(space[key], choice) else values[key] for key in space}


def with_values(config: Mapping[str, Any], full: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration with some values set.

    Args:
        config: as it stands in its file, with interpolations and without defaults.
        full: the same with everything resolved.
        values: by dotted key.
    """
    changed = deepcopy(dict(config))
    for key, value in values.items():
        node: Any = changed
        resolved: Any = full
        *path, last = key.split(".")
        for part in path:
            node, resolved = _descend(node, resolved, part)
        node[_index(resolved, last)] = value
    return changed


def _descend(node: Any, resolved: Any, part: str) -> tuple[Any, Any]:
    index = _index(resolved, part)
    inner = resolved[index]
    found = node[index] if isinstance(node, list) else node.get(index)
    if type(found) is not type(inner):
        # A list, and what the file gives in short or by interpolation, can only be changed once it is written out.
        node[index] = deepcopy(inner) if found is not None or isinstance(inner, list) else {}
    return node[index], inner


def _index(container: Any, part: str) -> Any:
    return int(part) if isinstance(container, list) else part


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    rows = enumerate(node) if isinstance(node, list) else node.items() if isinstance(node, dict) else ()
    for part, inner in rows:
        yield f"{prefix}{part}"
        yield from _keys(inner, f"{prefix}{part}.")


def _choices(values: list[Any]) -> BaseDistribution:
    return CategoricalDistribution(tuple(dict.fromkeys(json.dumps(value) for value in values)))


def _range(value: Any) -> BaseDistribution:
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys():
        raise ValueError("give {low: A, high: B} or a list of choices")
    for option in value:
        if option not in _OPTIONS:
            raise ValueError(str(unknown("option", str(option), _OPTIONS)))
    numbers = {name: _number(value[name]) for name in ("low", "high", "step") if name in value}
    log = value.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"log is {log!r}; give true or false")
    if all(isinstance(number, int) for number in numbers.values()):
        return IntDistribution(**numbers, log=log)  # type: ignore[arg-type]
    return FloatDistribution(**numbers, log=log)


def _number(value: Any) -> int | float:
    # YAML takes 1e-3 for a text.
    found = float(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return found
