"""Export: one file that needs no modmeta, checked against the model that it came from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmeta import __version__
from modmeta.adapters import AdaptedBackbone
from modmeta.adapters.adapter_file import AdapterFile
from modmeta.errors import ModmetaError, unknown
from modmeta.files import write_atomically
from modmeta.serving.export_graph import check_onnx, open_onnx, open_torch_export, write_onnx, write_torch_export
from modmeta.serving.export_state_dict import HEAD_SUFFIX, open_state_dict, write_state_dict

TOLERANCE = 1e-4
"""Largest difference of a logit from the live model's."""
_BATCHES = (1, 3)


@dataclass(frozen=True)
class Format:
    """A way to write an adapted model.

    Attributes:
        suffix: ending of the file.
        write: writes it, and returns a line on how to use it.
        open: reads it back, and returns the function from images to logits.
        check: raises if it cannot be written here, before any work is done.
        beside: ending of a second file that it may write.
    """

    suffix: str
    write: Callable[[Path, AdaptedBackbone, AdapterFile, dict[str, Any], torch.dtype], str]
    open: Callable[[Path], Callable[[Tensor], Tensor]]
    check: Callable[[], None] = lambda: None
    beside: str | None = None


FORMATS = {
    "state_dict": Format(".safetensors", write_state_dict, open_state_dict, beside=HEAD_SUFFIX),
    "torch_export": Format(".pt2", write_torch_export, open_torch_export),
    "onnx": Format(".onnx", write_onnx, open_onnx, check=check_onnx),
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        files: the files.
        difference: largest difference of a logit from the live model's, over random images.
        note: one line on how to use them.
    """

    files: tuple[Path, ...]
    difference: float
    note: str


def check_output(output: Path, format: str, overwrite: bool) -> None:
    """Make sure that an export can be written, before any work is done.

    Raises:
        ModmetaError: for an unknown format, missing packages, a wrong ending, a missing folder, or a file that is
            there already.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    kind = FORMATS[format]
    kind.check()
    if output.suffix != kind.suffix:
        raise ModmetaError(f"--output {output} should end with {kind.suffix} for --format {format}")
    if not output.parent.is_dir():
        raise ModmetaError(f"--output {output}: the folder {output.parent} does not exist")
    for path in (output, *([output.with_suffix(kind.beside)] if kind.beside else [])):
        if path.exists() and not overwrite:
            raise ModmetaError(f"--output {path} exists; choose another name or add --overwrite")


def export_adapter(
    model: AdaptedBackbone,
    content: AdapterFile,
    output: str | Path,
    format: str,
    live: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype = torch.uint8,
    overwrite: bool = False,
) -> Exported:
    """Write an adapted model as a file that needs no modmeta, and prove it by running what was written.

    ``state_dict`` holds tensors for ``timm.create_model``; ``torch_export`` and ``onnx`` hold a graph from images to
    logits and probabilities, for every batch size. The file is read back and compared with ``live`` before it appears.

    Args:
        model: the adapted model, on the CPU.
        content: the adapter file.
        output: the file to write, with the ending of its format.
        format: one of :data:`FORMATS`.
        live: logits ``(B, C)`` of images ``(B, 3, H, W)``, as they are today.
        dtype: of the images that a graph takes: uint8 in 0..255 or float32 in 0..1.
        overwrite: whether to replace a file that is there.

    Raises:
        ModmetaError: if the format cannot hold the adaptation, what was written computes something else, or there is
            no writing to ``output``. Nothing is left behind then.
    """
    target = Path(output)
    check_output(target, format, overwrite)
    kind = FORMATS[format]
    with tempfile.TemporaryDirectory(prefix="modmeta-export-") as scratch:
        trial = Path(scratch) / target.name
        note = kind.write(trial, model, content, _metadata(model, content), dtype)
        difference = _difference(kind.open(trial), live, model, dtype)
        if not difference <= TOLERANCE:
            raise ModmetaError(
                f"the export as {format} differs from the live model by {difference:.1e} in a logit, more than "
                f"{TOLERANCE:.0e}; nothing was written, try another --format"
            )
        written = sorted(Path(scratch).iterdir(), key=lambda path: path == trial)  # the file that names others last
        for path in written:
            write_atomically(target.with_name(path.name), path.read_bytes())
    return Exported(tuple(target.with_name(path.name) for path in reversed(written)), difference, note)


@torch.no_grad()
def _difference(
    exported: Callable[[Tensor], Tensor], live: Callable[[Tensor], Tensor], model: AdaptedBackbone, dtype: torch.dtype
) -> float:
    """Return the largest difference of a logit over random images; NaN if there is one."""
    size, generator = model.backbone.image_size, torch.Generator().manual_seed(0)
    worst = torch.zeros(())
    for batch in _BATCHES:
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
        given = images if dtype == torch.uint8 else images.float() / 255
        worst = torch.maximum(worst, (exported(given) - live(images)).abs().max())
    return float(worst)


def _metadata(model: AdaptedBackbone, content: AdapterFile) -> dict[str, Any]:
    backbone = model.backbone
    # What the command line does to an image file, whatever else the weights' publisher recommends: the largest
    # centred square, resized.
    preprocessing = {**backbone.preprocessing, "interpolation": "bicubic", "crop_pct": 1.0}
    return {
        "modmeta": __version__,
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint(),
        "preprocessing": preprocessing,
        "classes": list(content.classes),
        "num_classes": len(content.classes),
        "provenance": content.provenance,
    }
