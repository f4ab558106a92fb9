"""How deep and how strongly a policy's supports ask for statistics: by domain and number of shots.

    python benchmarks/strengths.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt

Every checkpoint plans for supports of the domain that it was not trained on; nothing is carried out and no query is
looked at. Shares of the episodes in which statistics were read beyond the first of the depths, and in which each factor
on the policy's gates was taken, the mean factor with its 95 % bootstrap interval over episodes, and the shares of the
variance of both choices that lie between domains, and between numbers of shots; seed 0.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from modmeta.adaptation import reading_units
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.learners import ModularMetaLearner, load_learner
from modmeta.learners.measuring import episode_support

RESAMPLES = 2000
Taken = dict[tuple[str, int], list[tuple[float, float]]]
"""By domain and shots: for each episode 1 or 0 for statistics beyond the first depth, and the factor on the gates."""


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
    found: Taken = {}
    for each in options.checkpoints:
        domain, _, path = each.partition("=")
        found |= taken(domain, path, options)
        print(
            domain, {shots: Counter(choices) for (name, shots), choices in found.items() if name == domain}, flush=True
        )
    print(table(found, options.episodes))


@torch.no_grad()
def taken(domain: str, path: str, options: argparse.Namespace) -> Taken:
    """Return what was chosen in every episode."""
    learner = load_learner(path)
    assert isinstance(learner, ModularMetaLearner)
    data = DomainDataModule(
        options.root, test_domains=[domain], image_size=learner.model.backbone.image_size, eval_shots=options.shots,
        queries=options.queries, test_episodes=options.episodes, cache_dir=options.cache_dir,
    )  # fmt: skip
    data.setup("test")
    found: Taken = {(domain, shots): [] for shots in options.shots}
    units = reading_units(learner.model.units)
    shallow, deep = learner.statistics_depths[0], max(learner.statistics_depths)
    for index in range(options.episodes * len(options.shots)):
        episode = data.episode("test", index)
        support = episode_support(episode, hide=False)
        situation = learner.situate(support)
        own = learner.plan(situation, depth=deep).gate_of()
        tuned, _ = learner.tune(situation, support)
        gates = tuned.gate_of()
        beyond = any(unit.name in gates for unit in units if unit.depth > shallow)
        # The smallest of the gates is the last one to be cut off at 1.
        ratios = [float(gates.get(unit.name, 0.0) / own[unit.name]) for unit in units if unit.depth <= shallow]
        found[domain, episode.shots].append((float(beyond), round(max(ratios), 3)))
    return found


def table(found: Taken, episodes: int) -> str:
    values = sorted({factor for choices in found.values() for _, factor in choices})
    random = np.random.default_rng(0)
    lines = ["| domain | shots | deep, % | " + " | ".join(f"x {value:g}, %" for value in values) + " | mean factor |"]
    lines += ["|" + "---|" * (4 + len(values))]
    for (domain, shots), choices in found.items():
        deep, factors = np.asarray(choices).T
        shares = [f"{100 * np.mean(factors == value):.0f}" for value in values]
        means = factors[random.integers(len(factors), size=(RESAMPLES, len(factors)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        row = [domain, shots, f"{100 * deep.mean():.0f}", *shares, f"{factors.mean():.2f} [{low:.2f}, {high:.2f}]"]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    for column, name in enumerate(("depth", "factor")):
        known = {key: np.asarray(choices)[:, column] for key, choices in found.items()}
        shares = [between(known, part) for part in (0, 1)]
        lines += [
            "",
            f"Of the variance of the {name}, {shares[0]:.0f} % lie between domains, {shares[1]:.0f} % between shots.",
        ]
    return "\n".join([*lines, "", f"{episodes} episodes per domain and number of shots."])


def between(known: Mapping[tuple[str, int], np.ndarray], part: int) -> float:
    """Return the share of the variance in % that lies between the groups of one part of the key."""
    groups: dict[object, list[np.ndarray]] = {}
    for key, values in known.items():
        groups.setdefault(key[part], []).append(values)
    whole = np.concatenate([*known.values()])
    joined = [np.concatenate(values) for values in groups.values()]
    spread = sum(len(values) * (values.mean() - whole.mean()) ** 2 for values in joined) / len(whole)
    return 100 * float(spread / max(whole.var(), 1e-12))


if __name__ == "__main__":
    main()
