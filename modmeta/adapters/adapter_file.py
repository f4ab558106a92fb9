"""The adapter file: what one domain adds to a shared backbone, as one file of checked, plain data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from modmeta.adapters.adapted import AdaptedBackbone, State
from modmeta.adapters.units import Unit
from modmeta.errors import ModmetaError
from modmeta.files import write_atomically

FORMAT = 1
MAX_BYTES = 512 * 2**20
MAX_HEADER = 2**20
HEAD = ("weight", "bias", "center", "scale")
"""Tensors of the classifier: logits are ``scale * ((features - center) @ weight + bias)``."""

_SCHEMA = {
    "format": int, "backbone": dict, "units": list, "classes": list, "head": dict, "plan": dict,
    "provenance": dict, "tensors": str,
}  # fmt: skip


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file.

    Attributes:
        classes: names of the classes.
        plan: what was carried out, as plain data; its ``units`` and ``gates`` say what is active.
        state: the tensors of the active units.
        classifier: the tensors named in :data:`HEAD`.
        head: options of the classifier, such as ``{"normalize": True}``.
        provenance: where the adaptation comes from.
    """

    classes: tuple[str, ...]
    plan: dict[str, Any]
    state: State
    classifier: dict[str, Tensor]
    head: dict[str, Any]
    provenance: dict[str, Any]


def write_adapter(path: str | Path, model: AdaptedBackbone, content: AdapterFile) -> str:
    """Write an adapter file, whole or not at all; the same content always gives the same bytes.

    Args:
        path: where to.
        model: the model that was adapted.
        content: what to write; of its state, only the active units' tensors are kept.

    Returns:
        the SHA-256 of its tensors.

    Raises:
        ModmetaError: if a number is not finite or the file cannot be written.
    """
    active = _active(content.plan)
    tensors = {f"state:{name}": tensor for name, tensor in content.state.items() if name.partition("|")[0] in active}
    tensors |= {f"head:{name}": content.classifier[name] for name in HEAD}
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModmetaError(f"the adaptation diverged: {name} is not finite; nothing was written")
    digest = _digest(tensors)
    metadata = {
        "format": FORMAT,
        "backbone": _identity(model),
        "units": [_describe(unit) for unit in model.units],
        "classes": list(content.classes),
        "head": content.head,
        "plan": content.plan,
        "provenance": content.provenance,
        "tensors": digest,
    }
    try:
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ModmetaError("the adaptation's plan holds a number that is not finite; nothing was written") from error
    # One key only: with more, their order would differ from process to process.
    write_atomically(path, save(tensors, {"modmeta": text}))
    return digest


def read_adapter(path: str | Path, model: AdaptedBackbone) -> AdapterFile:
    """Read an adapter file for ``model``; every check comes before any tensor is used.

    Raises:
        ModmetaError: if the file is damaged, of another format, or for another model.
    """
    file = Path(path)
    header, data = _read(file)
    metadata = _metadata(file, header)
    for what, ours in _identity(model).items():
        theirs = metadata["backbone"].get(what)
        if theirs != ours:
            raise ModmetaError(
                f"adapter file {file} is for another backbone: its {what} is {theirs}, that of this checkpoint {ours}"
            )
    active = _active_units(file, metadata, model)
    expected = _expected(model, active, len(metadata["classes"]))
    found = {
        name: (entry.get("dtype"), tuple(entry.get("shape", ())))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != ("F32", expected.get(name)):
            have, want = found.get(name, "missing"), expected.get(name, "known")
            _refuse(file, f"tensor {name!r} is {have}, not {want}")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ModmetaError(f"adapter file {file} is damaged ({error}); write it again with adapt") from error
    if _digest(tensors) != metadata["tensors"]:
        _refuse(file, "its tensors do not have the checksum that they were written with")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            _refuse(file, f"tensor {name!r} is not finite")
    return AdapterFile(
        classes=tuple(metadata["classes"]),
        plan=metadata["plan"],
        state={name.removeprefix("state:"): t for name, t in tensors.items() if name.startswith("state:")},
        classifier={name.removeprefix("head:"): t for name, t in tensors.items() if name.startswith("head:")},
        head=metadata["head"],
        provenance=metadata["provenance"],
    )


def _read(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and all bytes of a file whose size and first bytes are as they should be."""
    if not file.is_file():
        raise ModmetaError(f"adapter file {file} does not exist; write one with adapt")
    if file.stat().st_size > MAX_BYTES:
        _refuse(file, f"it has more than {MAX_BYTES // 2**20} MB")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        pickled = data.startswith((b"PK", b"\x80"))
        _refuse(file, "it is a pickled file, which may hold code" if pickled else "it is no safetensors file")
    return _json(file, data[8 : 8 + length]), data


def _metadata(file: Path, header: dict[str, Any]) -> dict[str, Any]:
    outer = header.get("__metadata__")
    if not isinstance(outer, dict) or set(outer) != {"modmeta"} or not isinstance(outer["modmeta"], str):
        _refuse(file, "it is a safetensors file, but not of modmeta")
    metadata = _json(file, outer["modmeta"].encode())
    if isinstance(metadata.get("format"), int) and metadata["format"] > FORMAT:
        _refuse(file, f"its format {metadata['format']} is newer than this version of modmeta knows")
    for key, kind in _SCHEMA.items():
        if not isinstance(metadata.get(key), kind):
            _refuse(file, f"its entry {key!r} is missing or of the wrong type")
    classes = metadata["classes"]
    if not all(isinstance(name, str) and 0 < len(name) <= 256 and name.isprintable() for name in classes):
        _refuse(file, "a class name is not printable text of at most 256 characters")
    if not all(isinstance(entry, dict) for entry in header.values()):
        _refuse(file, "its header is malformed")
    return metadata


def _active_units(file: Path, metadata: dict[str, Any], model: AdaptedBackbone) -> list[Unit]:
    local = {unit.name: unit for unit in model.units}
    stored = {unit.get("name"): unit for unit in metadata["units"] if isinstance(unit, dict)}
    plan = metadata["plan"]
    names, gates = plan.get("units"), plan.get("gates")
    if not isinstance(names, list) or not isinstance(gates, list) or len(gates) != len(names):
        _refuse(file, "its plan does not give a gate for every unit")
    if not all(isinstance(gate, (int, float)) and math.isfinite(gate) for gate in gates):
        _refuse(file, "a gate of its plan is no number")
    active = _active(plan)
    for name in active:
        if name not in local or stored.get(name) != json.loads(json.dumps(_describe(local[name]))):
            _refuse(file, f"the checkpoint has no such unit {name!r} with the same module, options and sites")
    return [local[name] for name in active]


def _expected(model: AdaptedBackbone, active: Sequence[Unit], classes: int) -> dict[str, tuple[int, ...]]:
    names = {unit.name for unit in active}
    width = model.backbone.feature_dim
    shapes = {
        f"state:{name}": tuple(tensor.shape)
        for name, tensor in model.fresh().items()
        if name.partition("|")[0] in names
    }
    head = {"weight": (width, classes), "bias": (classes,), "center": (width,), "scale": ()}
    return shapes | {f"head:{name}": shape for name, shape in head.items()}


def _active(plan: Mapping[str, Any]) -> list[str]:
    return [name for name, gate in zip(plan["units"], plan["gates"], strict=True) if gate > 0]


def _identity(model: AdaptedBackbone) -> dict[str, Any]:
    backbone = model.backbone
    return {
        "name": backbone.name,
        "preprocessing": backbone.preprocessing,
        "fingerprint": backbone.fingerprint(),
    }


def _describe(unit: Unit) -> dict[str, Any]:
    sites = [site.name for site in unit.sites]
    return {"name": unit.name, "module": unit.module.name, "options": unit.options, "sites": sites}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _json(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ModmetaError(f"adapter file {file} is refused: its header is no valid JSON ({error})") from error
    if not isinstance(found, dict):
        _refuse(file, "its header is malformed")
    return found


def _refuse(file: Path, why: str) -> NoReturn:
    raise ModmetaError(f"adapter file {file} is refused: {why}")
