"""How far is a head to be held back? Gain and harm for several strengths of the ridge.

    python benchmarks/held_back.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt

A fifth of the support labels of the domain that a checkpoint was not trained on is turned into other classes. Where
the checkpoint's head then doubts them, or does not although a class is left without an image, the domain is adapted to
with the policy's own factor on the ridge strength of the adapted model's head, and with that factor, but 1 at least,
times 1, 2 and 4 (which is what the learner does): mean factor of the policy, mean gain over the unadapted model in
points of accuracy with its 95 % bootstrap interval, and the episodes that end more than a point below it. The
unadapted model has the same share everywhere. Seed 1 unless told otherwise, so that no episode of the comparisons is
used up.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch

from modmeta.adaptation import LabelTrust, Plan, Support
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule, Episode
from modmeta.data.seeding import rng
from modmeta.evaluation.compare.runner import with_wrong_labels
from modmeta.evaluation.compare.statistics import episode_weights, interval
from modmeta.learners import MetaLearner, ModularMetaLearner, load_learner
from modmeta.learners.measuring import episode_ids, episode_support
from modmeta.learners.metrics import harmed

SHARE = 0.2
FACTORS = (1.0, 2.0, 4.0)
PLANNED = "the policy's"
DOUBT, LACK = "doubt", "a class without an image"


@torch.no_grad()
def main() -> None:
    options = arguments(__doc__).parse_args()
    quiet()
    print("| domain | shots | held back for | episodes | policy's factor | ridge | gain, points | harmed |")
    print("|---|---|---|---|---|---|---|---|")
    for domain, shots, learner in cells(options):
        learner.near_loss = 0.0
        planned: dict[str, list[float]] = {DOUBT: [], LACK: []}
        gains: dict[str, dict[str, list[float]]] = {DOUBT: {}, LACK: {}}
        for episode, support in episodes(learner, domain, shots, options, SHARE):
            trust = learner.wrong_labels(learner.prior_features(support.images), support)
            if trust is None or support.labels is None or not trust.holds_back(support.labels, support.ways):
                continue
            why = DOUBT if trust.doubted else LACK
            planned[why].append(measure(learner, episode, support, gains[why]))
        for why, factors in planned.items():
            for name, found in gains[why].items():
                share = f"{len(found)} of {options.episodes}"
                row = (domain, shots, why, share, f"{np.mean(factors):.2f}", name, *gain_and_harm(found))
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="DOMAIN=CKPT")
    parser.add_argument("--episodes", type=int, default=20, help="per domain and number of shots")
    parser.add_argument("--shots", type=int, nargs="+", default=[1])
    parser.add_argument("--queries", type=int, default=40, help="query images per class")
    parser.add_argument("--seed", type=int, default=1, help="of the draws")
    parser.add_argument("--cache_dir")
    return parser


def cells(options: argparse.Namespace) -> Iterator[tuple[str, int, ModularMetaLearner]]:
    """Yield every domain and number of shots with the learner that was not trained on the domain."""
    for each in options.checkpoints:
        domain, _, path = each.partition("=")
        learner = load_learner(path)
        assert isinstance(learner, ModularMetaLearner)
        for shots in options.shots:
            yield domain, shots, learner


def episodes(
    learner: MetaLearner, domain: str, shots: int, options: argparse.Namespace, wrong: float
) -> Iterator[tuple[Episode, Support]]:
    """Yield episodes of a domain, each with its support, of whose labels a share is wrong."""
    data = DomainDataModule(
        options.root, test_domains=[domain], image_size=learner.model.backbone.image_size, seed=options.seed,
        eval_shots=[shots], eval_queries=options.queries, test_episodes=options.episodes, cache_dir=options.cache_dir,
    )  # fmt: skip
    data.setup("test")
    learner.keep_features(data.store, options.cache_dir)
    for index in range(options.episodes):
        episode = data.episode("test", index)
        right = episode_support(episode, hide=False)
        random = rng(options.seed, "flipped labels", domain, index, shots)
        yield episode, with_wrong_labels(right, wrong, random) if wrong else right


def measure(learner: MetaLearner, episode: Episode, support: Support, gains: dict[str, list[float]]) -> float:
    """Add an episode's gain with every ridge, and return the policy's own factor."""
    _, ids = episode_ids(episode)
    before = accuracy(unadapted(learner, episode, support), episode)
    ways: dict[str, Callable[[Plan], Plan]] = {PLANNED: lambda plan: plan}
    for factor in FACTORS:
        ways[f"{factor:g}"] = lambda plan, by=factor: replace(plan, ridge=by * plan.ridge.clamp_min(1.0))
    for name, way in ways.items():
        with patch.object(LabelTrust, "temper", staticmethod(way)):
            adapted = learner.adapt(support)
        gains.setdefault(name, []).append(accuracy(learner.logits(adapted, episode.query, ids), episode) - before)
        if name == PLANNED:
            planned = adapted.report["plan"]["ridge"]
    return planned


def unadapted(learner: MetaLearner, episode: Episode, support: Support) -> torch.Tensor:
    """Return the query's logits by the unadapted model's head on a support."""
    _, ids = episode_ids(episode)
    return learner.fit_head(learner.prior_features(support.images), support)(learner.prior_features(episode.query, ids))


def accuracy(logits: torch.Tensor, episode: Episode) -> float:
    return float((logits.argmax(-1) == episode.query_labels).double().mean())


def gain_and_harm(gains: Sequence[float]) -> tuple[str, int]:
    """Return the mean gain in points with its interval, and how many episodes are harmed."""
    values = 100 * np.asarray(gains)
    _, low, high = interval(episode_weights(len(values), np.random.default_rng(0)) @ values)
    return f"{values.mean():+.2f} [{low:+.2f}, {high:+.2f}]", int(harmed(values / 100, np.zeros_like(values)).sum())


if __name__ == "__main__":
    main()
