"""``predict``: classes and probabilities of the images in a folder, with an adapter file."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

import torch
from rich.progress import track

from modmeta.adaptation import Adapted
from modmeta.adapters.adapter_file import read_adapter
from modmeta.commands.images import find_images, load_good_images
from modmeta.commands.load import load
from modmeta.commands.quiet import quiet
from modmeta.errors import ModmetaError
from modmeta.evaluation.abstention import shipped_threshold
from modmeta.files import write_atomically

_SHOWN = 10  # refused images that are named on the terminal; all have their row
COLUMNS = ("image", "class", "probability", "abstained")


def run(options: argparse.Namespace) -> int:
    """Classify and write the table."""
    quiet()
    if options.batch_size < 1:
        raise ModmetaError(f"--batch-size must be 1 or more, got {options.batch_size}")
    calibrated = options.abstain_below == "calibrated"
    threshold = 0.0 if calibrated else _probability(options.abstain_below)
    paths = find_images(options.images)
    learner = load(options)
    file = read_adapter(options.adapter, learner.model)
    adapted = Adapted.from_file(file, learner.device)
    if calibrated:
        threshold = shipped_threshold(file.provenance)
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    abstained, bad = 0, []
    batches = [paths[start : start + options.batch_size] for start in range(0, len(paths), options.batch_size)]
    for batch in track(batches, description="predicting"):
        good, refused = load_good_images(batch, learner.model.backbone.image_size)
        bad += refused
        answers: dict[Path, tuple[str, str, str]] = {Path(error.path): ("", "", "true") for error in refused}
        if good:
            with torch.no_grad():
                best = learner.logits(adapted, torch.stack(list(good.values())).to(learner.device)).softmax(-1).max(-1)
            for path, p, index in zip(good, best.values.tolist(), best.indices.tolist(), strict=True):
                unsure = p < threshold
                abstained += unsure
                answers[path] = (adapted.classes[index], f"{p:.6f}", str(unsure).lower())
        writer.writerows((path.relative_to(options.images).as_posix(), *answers[path]) for path in batch)
    if len(bad) == len(paths):
        raise bad[0]
    for error in bad[:_SHOWN]:
        print(f"no class: {error}", file=sys.stderr)
    write_atomically(options.output, table.getvalue().encode())
    below = f" below {threshold:.3f}" if calibrated else ""
    unread = f", {len(bad)} that cannot be used and have no class" if bad else ""
    print(f"{Path(options.output)}: {len(paths)} images, {abstained} abstained{below}{unread}")
    return 0


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ModmetaError(f"--abstain-below must lie in 0..1 or be `calibrated`, got {text}")
    return value
