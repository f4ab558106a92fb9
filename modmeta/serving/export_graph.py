"""Export to a graph: slots, head and normalisation as code, for ``torch.export`` and ONNX."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmeta.adapters import AdaptedBackbone
from modmeta.adapters.adapter_file import AdapterFile
from modmeta.backbone.weights import first_line
from modmeta.errors import ModmetaError
from modmeta.serving.export_module import ClosedModel, slot_units

METADATA = "modmeta.json"
"""Name of the file within a ``.pt2`` archive that holds the metadata."""
_OTHERWISE = "use --format state_dict"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx() -> None:
    """Make sure that the packages for ONNX are there.

    Raises:
        ModmetaError: naming those that are missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ModmetaError(f"--format onnx needs {', '.join(missing)}; pip install 'modmeta[export]'")


def write_torch_export(
    path: Path, model: AdaptedBackbone, content: AdapterFile, metadata: dict[str, Any], dtype: torch.dtype
) -> str:
    """Write a ``.pt2`` archive; see :func:`modmeta.serving.export.export_adapter`."""
    program = _traced(model, content, dtype)
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata, sort_keys=True)})
    return _note(dtype)


def open_torch_export(path: Path) -> Callable[[Tensor], Tensor]:
    """Load a ``.pt2`` archive, and return the function from images to logits."""
    module = torch.export.load(path).module()
    return lambda images: module(images)[0]


def write_onnx(
    path: Path, model: AdaptedBackbone, content: AdapterFile, metadata: dict[str, Any], dtype: torch.dtype
) -> str:
    """Write an ``.onnx`` file; see :func:`modmeta.serving.export.export_adapter`."""
    check_onnx()
    program = _traced(model, content, dtype)
    try:
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits", "probabilities"],
            dynamic_shapes={"images": {0: "batch"}},
        )
    except Exception as error:  # the exporter wraps whatever an operator's translation raises
        raise ModmetaError(
            f"backbone {model.backbone.name!r} cannot be translated to ONNX ({first_line(error)}); "
            "use --format torch_export"
        ) from error
    assert onnx is not None
    for name, value in metadata.items():
        onnx.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    onnx.save(path, external_data=False)
    return _note(dtype)


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Load an ``.onnx`` file in ONNX Runtime, and return the function from images to logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _traced(model: AdaptedBackbone, content: AdapterFile, dtype: torch.dtype) -> torch.export.ExportedProgram:
    size = model.backbone.image_size
    example = torch.zeros(2, 3, size, size, dtype=dtype)  # two images: a batch of one would count as a constant
    batch = {"images": {0: torch.export.Dim("batch")}}
    try:
        with warnings.catch_warnings():  # levit and its kin keep what they computed from a weight
            warnings.filterwarnings("ignore", message="The tensor attributes .* were assigned during export")
            return torch.export.export(ClosedModel(model, content), (example,), dynamic_shapes=batch)
    except Exception as error:  # tracing runs the backbone's own code, which may raise anything
        slots = ", ".join(unit.name for unit in slot_units(model, content))
        advice = f"units {slots} may be why: a slot should ask for x.shape[0], not len(x)" if slots else _OTHERWISE
        raise ModmetaError(
            f"backbone {model.backbone.name!r} cannot be traced by torch.export for every batch size "
            f"({first_line(error)}); {advice}"
        ) from error


def _note(dtype: torch.dtype) -> str:
    span = "uint8 in 0..255" if dtype == torch.uint8 else "float32 in 0..1"
    return f"takes images (B, 3, H, W), {span}; returns logits and probabilities (B, C)"
