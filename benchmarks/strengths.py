"""How deep and how strongly a policy's supports ask for statistics: by domain and number of shots.

    python benchmarks/strengths.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt --shots 1 5 10

Every checkpoint plans for supports of the domain that it was not trained on; nothing is carried out and no query is
looked at. Shares of the episodes in which statistics were read beyond the first of the depths, and in which each factor
on the policy's gates was taken, the mean factor with its 95 % bootstrap interval over episodes, and the shares of the
variance of both choices that lie between domains, and between numbers of shots. Seed 1 unless told otherwise, so that
no episode of the comparisons is used up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from held_back import arguments, cells, episodes

from modmeta.adaptation import Support, reading_units
from modmeta.commands.quiet import quiet
from modmeta.learners import ModularMetaLearner

RESAMPLES = 2000
Taken = dict[tuple[str, int], list[tuple[float, float]]]
"""By domain and shots: for each episode 1 or 0 for statistics beyond the first depth, and the factor on the gates."""


@torch.no_grad()
def main() -> None:
    options = arguments(__doc__).parse_args()
    quiet()
    found: Taken = {}
    for domain, shots, learner in cells(options):
        supports = (support for _, support in episodes(learner, domain, shots, options, wrong=0.0))
        found[domain, shots] = [taken(learner, support) for support in supports]
        print(domain, shots, Counter(found[domain, shots]), flush=True)
    print(table(found, options.episodes))


def taken(learner: ModularMetaLearner, support: Support) -> tuple[float, float]:
    """Return what was chosen for a support."""
    units = reading_units(learner.model.units)
    shallow, deep = learner.statistics_depths[0], max(learner.statistics_depths)
    situation = learner.situate(support)
    own = learner.plan(situation, depth=deep).gate_of()
    wrong = learner.wrong_labels(situation.features, support)
    tuned, _ = learner.tune(situation, support, wrong.believed if wrong and learner.veto else None)
    gates = tuned.gate_of()
    beyond = any(unit.name in gates for unit in units if unit.depth > shallow)
    # The smallest of the gates is the last one to be cut off at 1.
    ratio = max(float(gates.get(unit.name, 0.0) / own[unit.name]) for unit in units if unit.depth <= shallow)
    return float(beyond), min([1.0, *learner.statistics_strengths], key=lambda factor: abs(factor - ratio))


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
