"""How well a check finds wrong labels: a share of the labels is flipped, and the ranking should put those first.

    python benchmarks/label_suspicion.py ROOT [--backbone NAME --pretrained FILE|true --image-size N]

Of every domain, 5 % of the labels are turned into another one, in several draws; nothing is written to ROOT. Printed
are the precision among as many images as were flipped, and among the 24 that a check shows, with the 95 % interval of
Student's t over the draws. Chance is the flipped share.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from modmeta.backbone import Backbone
from modmeta.data.audit import take_survey
from modmeta.data.audit.suspicion import doubts
from modmeta.data.decode import decode_image
from modmeta.data.seeding import rng

SHOWN = 24


def flipped(labels: list[str], share: float, draw: int, seed: int, domain: str) -> tuple[list[str], np.ndarray]:
    random = rng(seed, "flip", domain, draw)
    names = sorted(set(labels))
    wrong = np.zeros(len(labels), bool)
    wrong[random.choice(len(labels), round(share * len(labels)), replace=False)] = True
    changed = list(labels)
    for row in np.flatnonzero(wrong):
        changed[row] = str(random.choice([name for name in names if name != labels[row]]))
    return changed, wrong


@torch.no_grad()
def features_of(paths: list[Path], backbone: Backbone) -> np.ndarray:
    parts = []
    for begin in range(0, len(paths), 32):
        images = torch.stack([decode_image(path, backbone.image_size) for path in paths[begin : begin + 32]])
        parts.append(backbone.run(backbone.prepare(images)).numpy())
    return np.concatenate(parts)


def interval(values: list[float]) -> str:
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    low, high = np.clip([np.mean(values) - half, np.mean(values) + half], 0, 1)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--backbone")
    parser.add_argument("--pretrained", default="true")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    survey = take_survey(options.root)
    features = survey.descriptors
    if options.backbone:
        pretrained = True if options.pretrained == "true" else options.pretrained
        paths = [survey.path(row) for row in survey.good]
        features = features_of(paths, Backbone(options.backbone, pretrained, options.image_size))
    images = [survey.inspections[row] for row in survey.good]
    print(f"{options.backbone or 'edges and colours'}, {options.share:.0%} flipped, {options.draws} draws, "
          f"seed {options.seed}")  # fmt: skip
    print("| domain | images | flipped | precision among as many as flipped | among the first 24 |")
    print("|---|---|---|---|---|")
    for domain in sorted({image.domain for image in images}):
        rows = np.flatnonzero([image.domain == domain for image in images])
        labels = [images[row].class_name for row in rows]
        among, first, count = [], [], 0
        for draw in range(options.draws):
            given, wrong = flipped(labels, options.share, draw, options.seed, domain)
            count = int(wrong.sum())
            judged = doubts(features[rows], [domain] * len(rows), given)
            margins = [doubt.margin if doubt else -np.inf for doubt in judged]
            ranking = np.argsort(-np.array(margins), kind="stable")
            among.append(float(wrong[ranking[:count]].mean()))
            first.append(float(wrong[ranking[:SHOWN]].mean()))
        print(f"| {domain} | {len(rows):,} | {count} | {interval(among)} | {interval(first)} |")


if __name__ == "__main__":
    main()
