"""Settings, episodes and made-up rows of small comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np

from modmeta.data import DigitsDomains, DomainDataModule
from modmeta.evaluation.compare import Comparison, Manifest, Row, draw_manifest

DATA = {"root": "digits", "ways": 3, "queries": 4, "shots": 1}


def settings(**changes: Any) -> Comparison:
    """Return the settings of two systems on two domains."""
    options: dict[str, Any] = {
        "checkpoints": {"neon": "a.ckpt", "paper": "b.ckpt"},
        "systems": {"anchored_ridge": {"system": "head"}, "other": {"system": "head"}},
        "episodes": 3, "shots": [1, 2], "data": DATA,
    }  # fmt: skip
    return Comparison(**(options | changes))


def modules(digits: DigitsDomains, comparison: Comparison) -> dict[str, DomainDataModule]:
    """Return a data module for each test domain."""
    found = {}
    for domain in comparison.domains:
        own = {"test_domains": [domain], "test_episodes": comparison.episodes, "eval_shots": comparison.shots}
        found[domain] = DomainDataModule(**{**comparison.data, **own, "seed": comparison.seed})
        found[domain].store = digits
        found[domain].setup("test")
    return found


def manifest(digits: DigitsDomains, comparison: Comparison) -> Manifest:
    """Return the frozen episodes of a comparison."""
    return draw_manifest(modules(digits, comparison))


def row(system: str, domain: str = "neon", shots: int = 1, draw: int = 0, **changes: Any) -> Row:
    """Return a made-up row."""
    bins = [[0.0, 0.0, 0.0] for _ in range(15)]
    bins[9] = [4.0, 2.6, 3.0]
    figures: dict[str, Any] = {
        "ways": 3, "accuracy": 0.75, "nll": 0.5, "parameters_updated": 0.0, "backward_macs": 0, "seconds": 0.1,
        "bins": bins,
    }  # fmt: skip
    return Row(system, domain, shots, draw, **(figures | changes))


def rows(comparison: Comparison, seed: int = 0) -> list[Row]:
    """Return random rows of all systems on all episodes."""
    random = np.random.default_rng(seed)
    found = []
    for domain in comparison.domains:
        for shots in comparison.shots:
            for draw in range(comparison.episodes):
                for system in comparison.systems:
                    hits, loss, seconds = int(random.integers(20, 101)), *random.random(2)
                    bins = [[0.0, 0.0, 0.0] for _ in range(15)]
                    bins[9] = [100.0, 64.0, float(hits)]
                    figures = {"accuracy": hits / 100, "nll": float(loss), "seconds": float(seconds), "bins": bins}
                    found.append(row(system, domain, shots, draw, **figures))
    return found
