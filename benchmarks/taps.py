"""What taps add to closed-form heads on PACS: the same episodes, features with and without middle layers.

    python benchmarks/taps.py --root PACS --weights tf_efficientnet_lite0.safetensors

Each domain is held out in turn; the source classifier comes from 60 images per class of the other three, and so does
the scale of the taps. Heads have their default strengths. Intervals of 95 % by the bootstrap over episodes, within
domains.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from modmeta.adaptation import HEADS, SourceStatistics
from modmeta.backbone import Backbone
from modmeta.data import DomainDataModule
from modmeta.files import write_atomically

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="the folder domain/class/image")
    parser.add_argument("--weights", type=Path, help="local weights; default: the hub's")
    parser.add_argument("--out", default=Path("runs/benchmark-taps"), type=Path)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--taps", nargs="+", default=["blocks.4", "blocks.5"])
    parser.add_argument("--heads", nargs="+", default=["prototype", "ridge", "anchored_ridge"], choices=HEADS.names())
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--queries", type=int, default=15, help="query images per class")
    parser.add_argument("--episodes", type=int, default=300, help="episodes per domain and number of shots")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", help="folder for decoded images")
    options = parser.parse_args()
    weights = str(options.weights) if options.weights else True
    accuracy: dict[tuple[str, bool], list[Tensor]] = {}  # by head and taps: per domain (shots, episodes)
    for tapped in (False, True):
        taps = options.taps if tapped else ()
        backbone = Backbone(options.backbone, weights, options.image_size, taps=taps)
        raw: Tensor | None = None
        for domain in DOMAINS:
            data = DomainDataModule(
                str(options.root), test_domains=[domain], image_size=options.image_size, eval_shots=options.shots,
                queries=options.queries, test_episodes=options.episodes, cache_dir=options.cache, seed=options.seed,
            )  # fmt: skip
            data.setup()
            raw = features(backbone, data) if raw is None else raw
            for head, found in on_domain(backbone, data, raw, options).items():
                accuracy.setdefault((head, tapped), []).append(found)
            print(f"{domain}, {'with' if tapped else 'without'} taps: done", flush=True)
    text = table(accuracy, options)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / "table.md", text.encode())
    rows = [
        {"head": head, "taps": tapped, "domain": domain, "shots": k, "accuracy": found[row].tolist()}
        for (head, tapped), domains in accuracy.items()
        for domain, found in zip(DOMAINS, domains, strict=True)
        for row, k in enumerate(options.shots)
    ]
    write_atomically(options.out / "episodes.json", json.dumps(rows, allow_nan=False).encode())
    print(text)


@torch.no_grad()
def features(backbone: Backbone, data: DomainDataModule) -> Tensor:
    """Return the features of all images, before any calibration."""
    rows = torch.arange(len(data.store)).split(64)
    return torch.cat([backbone(data.store.load(chunk)) for chunk in rows])


@torch.no_grad()
def on_domain(
    backbone: Backbone, data: DomainDataModule, raw: Tensor, options: argparse.Namespace
) -> dict[str, Tensor]:
    """Return per head the accuracy ``(shots, episodes)`` on the held-out domain."""
    if backbone.taps:
        backbone.tap_scale = torch.ones_like(backbone.tap_scale)
    sources = SourceStatistics()
    chunks = ((name, images, labels) for name, images, labels, _ in data.source_images(60))
    sources.measure(backbone, chunks, data.classes)
    x = raw
    if backbone.taps:
        x = torch.cat([raw[:, : backbone.own_dim], raw[:, backbone.own_dim :] * backbone.tap_scale], dim=1)
    view = sources.view()
    found: dict[str, list[float]] = {head: [] for head in options.heads}
    order: list[int] = []
    for index in range(options.episodes * len(options.shots)):
        episode = data.episode("test", index)
        order.append(options.shots.index(episode.shots))
        anchor = view.anchor(episode.classes)
        support, query = x[episode.support_ids], x[episode.query_ids]
        for head in options.heads:
            classifier = HEADS.get(head)().fit(support, episode.support_labels, len(episode.classes), anchor)
            hits = classifier(query).argmax(1) == episode.query_labels
            found[head].append(float(hits.float().mean()))
    rows = torch.tensor(order)
    return {
        head: torch.stack([torch.tensor(values)[rows == row] for row in range(len(options.shots))])
        for head, values in found.items()
    }


def table(accuracy: dict[tuple[str, bool], list[Tensor]], options: argparse.Namespace) -> str:
    lines = [
        f"Accuracy in %, 7-way, frozen {options.backbone} at {options.image_size} px, taps {', '.join(options.taps)}, "
        f"{options.episodes} episodes per domain and number of shots, {options.queries} queries per class, seed "
        f"{options.seed}; paired difference with its 95 % interval.",
        "",
        "| shots | head | without taps: " + ", ".join(DOMAINS) + " | mean | with taps | mean | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    generator = torch.Generator().manual_seed(options.seed)
    for row, k in enumerate(options.shots):
        for head in options.heads:
            plain, tapped = (100 * torch.stack([d[row] for d in accuracy[head, each]]) for each in (False, True))
            difference = tapped - plain  # (domains, episodes)
            picks = torch.randint(difference.shape[1], (RESAMPLES, *difference.shape), generator=generator)
            means = difference.expand(RESAMPLES, -1, -1).gather(2, picks).mean((1, 2))
            low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
            each = [", ".join(f"{value:.1f}" for value in system.mean(1).tolist()) for system in (plain, tapped)]
            lines.append(
                f"| {k} | {head} | {each[0]} | {plain.mean():.1f} | {each[1]} | {tapped.mean():.1f} | "
                f"{difference.mean():+.1f} [{low:+.1f}, {high:+.1f}] |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
