"""Which strength of the statistics a policy's supports ask for: by domain and number of shots.

    python benchmarks/strengths.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt

Every checkpoint plans for supports of the domain that it was not trained on; nothing is carried out and no query is
looked at. Shares of the episodes in which each factor on the policy's gates was taken, the mean factor with its 95 %
bootstrap interval over episodes, and the share of the factor's variance that lies between domains, and between numbers
of shots; seed 0.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.learners import ModularMetaLearner, load_learner
from modmeta.learners.measuring import episode_support

RESAMPLES = 2000
Factors = dict[tuple[str, int], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="DOMAIN=CKPT")
    parser.add_argument("--episodes", type=int, default=20, help="per domain and number of shots")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--queries", type=int, default=40, help="as in the fit's tests, for the same supports")
    parser.add_argument("--cache_dir", type=Path)
    options = parser.parse_args()
    quiet()
    factors: Factors = {}
    for each in options.checkpoints:
        domain, _, path = each.partition("=")
        factors |= taken(domain, path, options)
        print(domain, {shots: Counter(found) for (name, shots), found in factors.items() if name == domain}, flush=True)
    print(table(factors, options.episodes))


@torch.no_grad()
def taken(domain: str, path: str, options: argparse.Namespace) -> Factors:
    """Return the factor of every episode."""
    learner = load_learner(path)
    assert isinstance(learner, ModularMetaLearner)
    data = DomainDataModule(
        options.root, test_domains=[domain], image_size=learner.model.backbone.image_size, eval_shots=options.shots,
        queries=options.queries, test_episodes=options.episodes, cache_dir=options.cache_dir,
    )  # fmt: skip
    data.setup("test")
    found: Factors = {(domain, shots): [] for shots in options.shots}
    for index in range(options.episodes * len(options.shots)):
        episode = data.episode("test", index)
        support = episode_support(episode, hide=False)
        situation = learner.situate(support)
        plan = learner.plan(situation)
        tuned, _ = learner.tune(plan, support, situation.features)
        reading = [row for row, unit in enumerate(learner.model.units) if unit.reads and float(plan.gates[row]) > 0]
        row = min(reading, key=lambda row: float(plan.gates[row]))  # the last to be cut off at 1
        found[domain, episode.shots].append(round(float(tuned.gates[row] / plan.gates[row]), 3))
    return found


def table(factors: Factors, episodes: int) -> str:
    values = sorted({value for found in factors.values() for value in found})
    random = np.random.default_rng(0)
    lines = ["| domain | shots | " + " | ".join(f"x {value:g}, %" for value in values) + " | mean factor |"]
    lines += ["|" + "---|" * (3 + len(values))]
    for (domain, shots), found in factors.items():
        shares = [f"{100 * found.count(value) / len(found):.0f}" for value in values]
        means = np.asarray(found)[random.integers(len(found), size=(RESAMPLES, len(found)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        mean = f"{np.mean(found):.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"| {domain} | {shots} | " + " | ".join(shares) + f" | {mean} |")
    whole = np.concatenate([np.asarray(found) for found in factors.values()])
    shares = [between(factors, 0, whole), between(factors, 1, whole)]
    told = f"Of the factor's variance {shares[0]:.0f} % lie between domains, {shares[1]:.0f} % between numbers of shots"
    return "\n".join([*lines, "", f"{told}; {episodes} episodes per domain and number of shots."])


def between(factors: Factors, part: int, whole: np.ndarray) -> float:
    """Return the share of the variance in % that lies between the groups of one part of the key."""
    groups: dict[object, list[float]] = {}
    for key, found in factors.items():
        groups.setdefault(key[part], []).extend(found)
    spread = sum(len(found) * (np.mean(found) - whole.mean()) ** 2 for found in groups.values()) / len(whole)
    return 100 * float(spread / max(whole.var(), 1e-12))


if __name__ == "__main__":
    main()
