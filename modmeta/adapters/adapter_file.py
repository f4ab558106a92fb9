"""The adapter file: what one domain adds to a shared backbone, as one file of checked, plain data."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from modmeta.adapters.adapted import AdaptedBackbone, State
from modmeta.adapters.header import MAX_HEADER, canonical, checksum, parse, read_header, refuse, shown
from modmeta.adapters.module import MODULES
from modmeta.adapters.units import Unit
from modmeta.errors import ModmetaError, unknown
from modmeta.files import write_atomically

FORMAT = 2
HEAD = ("weight", "bias", "center", "scale")
"""Tensors of the classifier: logits are ``scale * ((features - center) @ weight + bias)``."""
PRIOR_HEAD = "prior."
"""Before their names, and that of its options, those of a second one: its logits of unadapted features are added."""

_SCHEMA = {
    "format": int, "backbone": dict, "units": list, "classes": list, "head": dict, "plan": dict,
    "provenance": dict, "tensors": str, "checksum": str,
}  # fmt: skip


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file.

    Attributes:
        classes: names of the classes.
        plan: what was carried out, as plain data; its ``units`` and ``gates`` say what is active.
        state: the tensors of the active units.
        classifier: the tensors named in :data:`HEAD`; a second classifier's have :data:`PRIOR_HEAD` before their names.
        head: options of the classifiers, such as ``{"normalize": True}``.
        provenance: where the adaptation comes from.
    """

    classes: tuple[str, ...]
    plan: dict[str, Any]
    state: State
    classifier: dict[str, Tensor]
    head: dict[str, Any]
    provenance: dict[str, Any]

    def holding(self, tensors: Mapping[str, Tensor]) -> AdapterFile:
        """Return the content with other tensors, by their names in a file."""
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "head": {}}
        for name, tensor in tensors.items():
            part, _, own = name.partition(":")
            parts[part][own] = tensor
        return replace(self, state=parts["state"], classifier=parts["head"])


def has_prior(head: Mapping[str, Any]) -> bool:
    """Return whether the options of a file's head are of two classifiers, the second on unadapted features."""
    return any(option.startswith(PRIOR_HEAD) for option in head)


def write_adapter(path: str | Path, model: AdaptedBackbone, content: AdapterFile) -> str:
    """Write an adapter file, whole or not at all; the same content always gives the same bytes.

    Args:
        path: where to.
        model: the model that was adapted.
        content: what to write; of its state, only the active units' tensors are kept.

    Returns:
        the SHA-256 of its tensors.

    Raises:
        ModmetaError: if the content could not be read again, as a number is not finite or a tensor does not fit the
            model, or if the file cannot be written.
    """
    tensors = checked_tensors(content, model)
    if (fault := _fault_of_classes(content.classes)) is not None:
        raise ModmetaError(f"nothing was written: {fault}")
    metadata = {
        "format": FORMAT,
        "backbone": _identity(model, model.backbone.fingerprint()),
        "units": [_describe(unit) for unit in model.units],
        "classes": list(content.classes),
        "head": content.head,
        "plan": content.plan,
        "provenance": content.provenance,
        "tensors": tensor_digest(tensors),
    }
    try:
        text = canonical(metadata | {"checksum": checksum(metadata)})
    except ValueError as error:
        raise ModmetaError("nothing was written: the plan holds a number that is not finite") from error
    # One key only: with more, their order would differ from process to process.
    data = save(tensors, {"modmeta": text})
    if int.from_bytes(data[:8], "little") > MAX_HEADER:
        raise ModmetaError("the adaptation has too many sites to be described in one file; let fewer sites adapt")
    write_atomically(path, data)
    return str(metadata["tensors"])


def checked_tensors(content: AdapterFile, model: AdaptedBackbone) -> dict[str, Tensor]:
    """Return the tensors that a file of ``content`` holds, by their names in it.

    Raises:
        ModmetaError: if ``model`` lacks a unit, or a tensor is missing, of another shape or not finite.
    """
    units = {unit.name: unit for unit in model.units}
    active = _active(content.plan)
    for name in active:
        if name not in units:
            raise unknown("unit", name, units, where="the adaptation")
    own = {f"state:{name}": t for name, t in content.state.items() if name.partition("|")[0] in active}
    own |= {f"head:{name}": tensor for name, tensor in content.classifier.items()}
    tensors: dict[str, Tensor] = {}
    for name, shape in _expected(model, [units[name] for name in active], content.head, len(content.classes)).items():
        if name not in own or tuple(own[name].shape) != shape:
            found = tuple(own[name].shape) if name in own else "missing"
            raise ModmetaError(f"the adaptation does not fit the units: tensor {name!r} is {found}, not {shape}")
        if not torch.isfinite(own[name]).all():
            raise ModmetaError(f"the adaptation diverged: tensor {name!r} is not finite")
        tensors[name] = own[name].detach().to("cpu", torch.float32).contiguous()
    return tensors


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return ``"sha256:..."`` over tensors on the CPU, their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def read_adapter(path: str | Path, model: AdaptedBackbone, fingerprint: str | None = None) -> AdapterFile:
    """Read an adapter file for ``model``; what the header says is checked before any tensor is read.

    Args:
        path: the file.
        model: the backbone and units that it must be for.
        fingerprint: that of the model's backbone where it is known already; finding it reads every weight.

    Raises:
        ModmetaError: if the file is damaged, of another format, or for another model.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise ModmetaError(f"adapter file {file} does not exist; write one with adapt")
        with file.open("rb") as stream:
            return _read(file, stream, model, fingerprint)
    except OSError as error:
        raise ModmetaError(f"adapter file {file} cannot be read ({error.strerror})") from error


def _read(file: Path, stream: BinaryIO, model: AdaptedBackbone, fingerprint: str | None) -> AdapterFile:
    header = read_header(file, stream)
    begin = stream.tell()
    metadata = _metadata(file, header)
    for what, ours in _identity(model, fingerprint or model.backbone.fingerprint()).items():
        theirs = metadata["backbone"].get(what)
        if theirs != ours:
            raise ModmetaError(
                f"adapter file {file} is for another backbone: its {what} is {shown(theirs)}, "
                f"that of this checkpoint {ours}"
            )
    active = _active_units(file, metadata, model)
    expected = _expected(model, active, metadata["head"], len(metadata["classes"]))
    found = {name: (entry.get("dtype"), entry.get("shape")) for name, entry in header.items()}
    for name in sorted(expected.keys() | found.keys()):
        shape = expected.get(name)
        if shape is None or found.get(name) != ("F32", list(shape)):
            have, want = shown(found.get(name, "missing")), "known" if shape is None else ("F32", shape)
            refuse(file, f"tensor {shown(name)!r} is {have}, not {want}")
    size = 4 * sum(math.prod(shape) for shape in expected.values())
    if os.fstat(stream.fileno()).st_size != begin + size:
        refuse(file, "it is damaged: its size is not that of its tensors; write it again with adapt")
    stream.seek(0)
    try:
        tensors = load(stream.read(begin + size))
    except SafetensorError as error:
        refuse(file, f"it is damaged ({error}); write it again with adapt")
    if tensor_digest(tensors) != metadata["tensors"]:
        refuse(file, "its tensors do not have the checksum that they were written with")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            refuse(file, f"tensor {name!r} is not finite")
    plain = {name: metadata[name] for name in ("plan", "head", "provenance")}
    return AdapterFile(classes=tuple(metadata["classes"]), state={}, classifier={}, **plain).holding(tensors)


def _metadata(file: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Take modmeta's metadata out of the header, which leaves the tensors' entries."""
    outer = header.pop("__metadata__", None)
    if not isinstance(outer, dict) or set(outer) != {"modmeta"} or not isinstance(outer["modmeta"], str):
        refuse(file, "it is a safetensors file, but not of modmeta")
    if not all(isinstance(entry, dict) for entry in header.values()):
        refuse(file, "its header is malformed")
    metadata = parse(file, outer["modmeta"].encode())
    if metadata.get("format") != FORMAT:
        refuse(file, f"its format is {metadata.get('format')}, not {FORMAT}, which this version reads; adapt again")
    for key, kind in _SCHEMA.items():
        if not isinstance(metadata.get(key), kind):
            refuse(file, f"its entry {key!r} is missing or of the wrong type")
    if canonical(metadata) != outer["modmeta"]:
        refuse(file, "its metadata is not in the form in which modmeta writes it")
    if checksum({key: value for key, value in metadata.items() if key != "checksum"}) != metadata["checksum"]:
        refuse(file, "its metadata does not have the checksum that it was written with")
    if (fault := _fault_of_classes(metadata["classes"])) is not None:
        refuse(file, fault)
    return metadata


def _fault_of_classes(classes: Sequence[Any]) -> str | None:
    if not all(isinstance(name, str) and 0 < len(name) <= 256 and name.isprintable() for name in classes):
        return "a class name is not printable text of at most 256 characters"
    if not classes or len(set(classes)) < len(classes):
        return "its class names are not distinct, or there is none"
    return None


def _active_units(file: Path, metadata: dict[str, Any], model: AdaptedBackbone) -> list[Unit]:
    plan, units = metadata["plan"], metadata["units"]
    names, gates = plan.get("units"), plan.get("gates")
    if not isinstance(names, list) or not isinstance(gates, list) or len(gates) != len(names):
        refuse(file, "its plan does not give a gate for every unit")
    if not all(type(gate) in (int, float) and 0 <= gate <= 1 for gate in gates):
        refuse(file, "a gate of its plan is no number in 0..1")
    stored = {unit["name"]: unit for unit in units if isinstance(unit, dict) and isinstance(unit.get("name"), str)}
    if len(stored) < len(units) or names != list(stored):
        refuse(file, "its plan and its list of units do not agree")
    local = {unit.name: unit for unit in model.units}
    active = _active(plan)
    for name in active:
        module = stored[name].get("module")
        if not isinstance(module, str) or module not in MODULES:
            advice = "install its package or give its file with --modules"
            refuse(file, f"it needs the adapter module {shown(module)!r}, which is unknown here; {advice}")
        if name not in local or canonical(stored[name]) != canonical(_describe(local[name])):
            refuse(file, f"the checkpoint has no such unit {shown(name)!r} with the same module, options and sites")
    return [local[name] for name in active]


def _expected(
    model: AdaptedBackbone, active: Sequence[Unit], options: Mapping[str, Any], classes: int
) -> dict[str, tuple[int, ...]]:
    names = {unit.name for unit in active}
    width = model.backbone.feature_dim
    shapes = {
        f"state:{name}": tuple(tensor.shape)
        for name, tensor in model.fresh().items()
        if name.partition("|")[0] in names
    }
    head = {"weight": (width, classes), "bias": (classes,), "center": (width,), "scale": ()}
    parts = ("", PRIOR_HEAD) if has_prior(options) else ("",)
    return shapes | {f"head:{part}{name}": shape for part in parts for name, shape in head.items()}


def _active(plan: Mapping[str, Any]) -> list[str]:
    return [name for name, gate in zip(plan["units"], plan["gates"], strict=True) if gate > 0]


def _identity(model: AdaptedBackbone, fingerprint: str) -> dict[str, Any]:
    backbone = model.backbone
    return {"name": backbone.name, "preprocessing": backbone.preprocessing, "fingerprint": fingerprint}


def _describe(unit: Unit) -> dict[str, Any]:
    sites = [site.name for site in unit.sites]
    return {"name": unit.name, "module": unit.module.name, "options": unit.options, "sites": sites}
