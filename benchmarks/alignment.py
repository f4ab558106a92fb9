"""Source training with every alignment against empirical risk minimisation, on a digits style that is held out.

    python benchmarks/alignment.py [--held-out STYLE ...] [--epochs N] [--seeds N] [--only NAME ...]

A tiny backbone is trained from random weights on the other styles, with the alignment's own defaults, and its linear
classifier judges all images of the style that is held out. A seed fixes weights, batches and whatever an alignment
draws. Printed are the accuracy and its difference from empirical risk minimisation with the same seeds, in per cent,
each with the 95 % interval of Student's t over the seeds: with few of them it is wide, and that is the message.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from scipy.stats import t as student

from modmeta.data import DomainDataModule
from modmeta.learners import ALIGNMENTS, AlignmentConfig, BackboneConfig, SourceConfig, SourceLearner

SIDE, STEPS = 32, 20


def accuracy(name: str | None, held_out: str, seed: int, epochs: int) -> tuple[float, int]:
    """Return the share of the held-out style's images that are classified rightly, in per cent, and their number."""
    seed_everything(seed, verbose=False)
    alignment = None if name is None else AlignmentConfig(name)
    backbone = BackboneConfig("test_efficientnet", pretrained=False, image_size=SIDE, seed=seed)
    learner = SourceLearner(backbone, SourceConfig(epochs, alignment=alignment))
    data = DomainDataModule("digits", test_domains=[held_out], image_size=SIDE, steps_per_epoch=STEPS, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        ).fit(learner, datamodule=data)  # fmt: skip
    assert learner.phase is not None
    right = []
    for label, class_name in enumerate(data.classes):
        images = data.store.load(data.store.ids(held_out, class_name))
        with torch.no_grad():
            right.append(learner.phase.classifier(learner.backbone(images)).argmax(1) == label)
    return 100 * float(torch.cat(right).float().mean()), len(torch.cat(right))


def interval(values: np.ndarray, least: float, most: float) -> tuple[float, float, float]:
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    low, high = np.clip([np.mean(values) - half, np.mean(values) + half], least, most)
    return float(np.mean(values)), low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", nargs="+", default=["paper"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=ALIGNMENTS.names())
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: an interval takes 2 or more")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for held_out in options.held_out:
        print(f"\nheld out: {held_out}; {options.epochs} epochs of {STEPS} steps of 64 images; seeds 0 to "
              f"{options.seeds - 1}\n")  # fmt: skip
        print("| alignment | accuracy, % | minus ERM, points | images | CPU seconds per fit |")
        print("|---|---|---|---|---|", flush=True)
        erm = np.zeros(options.seeds)
        for name in (None, *options.only):
            begin = time.process_time()
            found, counts = zip(
                *(accuracy(name, held_out, seed, options.epochs) for seed in range(options.seeds)), strict=True
            )
            seconds = (time.process_time() - begin) / options.seeds
            rates = np.array(found)
            erm = rates if name is None else erm
            share = "{:.1f} [{:.1f}, {:.1f}]".format(*interval(rates, 0, 100))
            gap = "" if name is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval(rates - erm, -100, 100))
            print(f"| {name or 'none (ERM)'} | {share} | {gap} | {counts[0]} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
