"""``export``: an adapted model as a file that needs no modmeta."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from modmeta.adaptation import Adapted
from modmeta.adapters.adapter_file import read_adapter
from modmeta.commands.load import load
from modmeta.commands.quiet import quiet
from modmeta.serving.export import check_output, export_adapter


def run(options: argparse.Namespace) -> int:
    """Export, and say how near to the live model the result is."""
    quiet()
    output = Path(options.output)
    check_output(output, options.format, options.overwrite)
    learner = load(options)
    content = read_adapter(options.adapter, learner.model)
    adapted = Adapted.from_file(content)

    def live(images: Tensor) -> Tensor:
        return learner.logits(adapted, images)

    dtype = torch.uint8 if options.input == "uint8" else torch.float32
    exported = export_adapter(
        learner.model, content, output, options.format, live, dtype=dtype, overwrite=options.overwrite
    )
    print(exported.note)
    print(f"largest difference of a logit from the live model: {exported.difference:.1e}")
    for file in exported.files:
        print(f"{file} ({file.stat().st_size / 1000:.0f} kB)")
    return 0
