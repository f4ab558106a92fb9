"""What the policy decides on episodes of several domains, and how much of that varies with domain and shots."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modmeta.adaptation import PRIOR, Plan
from modmeta.adaptation.track_record import CANDIDATES
from modmeta.data import ImageStore
from modmeta.data.seeding import rng, seed_global
from modmeta.evaluation.compare import Place
from modmeta.evaluation.compare.statistics import episode_weights, interval
from modmeta.evaluation.systems.learned import FixedIndicators, view_of
from modmeta.files import append, drop_torn_line
from modmeta.learners import ModularMetaLearner, Result
from modmeta.learners.measuring import episode_support
from modmeta.learners.metrics import bootstrap_interval

RESAMPLES = 1000
SOURCES = ("domain", "shots", "domain x shots", "episode")
CHOICES = (PRIOR, *CANDIDATES)
Cell = tuple[str, int, int]


@dataclass(frozen=True)
class Decision:
    """What the policy saw of one episode, planned for it, and what the veto left of the plan.

    Attributes:
        domain: the episode's domain, hidden from all that is known of the sources where it is one.
        shots: support images per class.
        draw: its number among the episodes of that domain and number of shots.
        whole: standardised global indicators.
        each: standardised indicators per unit.
        plan: the policy's plan, as plain data.
        choice: name of the candidate that the veto chose.
        gates: of the plan that was carried out.
    """

    domain: str
    shots: int
    draw: int
    whole: list[float]
    each: list[list[float]]
    plan: dict[str, Any]
    choice: str
    gates: list[float]

    @property
    def cell(self) -> Cell:
        """What there is one decision of."""
        return self.domain, self.shots, self.draw

    @property
    def indicators(self) -> tuple[Tensor, Tensor]:
        """The indicators as the policy sees them."""
        return torch.tensor(self.whole), torch.tensor(self.each)


def decide_all(
    learner: ModularMetaLearner, places: Sequence[Place], store: ImageStore, path: Path, say: Callable[[str], None]
) -> dict[Cell, Decision]:
    """Return the decision on every episode, taking those that the file does not hold yet."""
    found = {each.cell: each for each in (Decision(**json.loads(line)) for line in drop_torn_line(path))}
    missing = [place for place in places if (place.domain, place.shots, place.draw) not in found]
    begin = time.perf_counter()
    for number, place in enumerate(missing, 1):
        decision = decide(learner, place, store)
        append(path, json.dumps(asdict(decision), allow_nan=False).encode() + b"\n")
        found[decision.cell] = decision
        if not number % 20 or number == len(missing):
            say(f"decisions: {number} of {len(missing)}, {time.perf_counter() - begin:.0f} s")
    return found


@torch.no_grad()
def decide(learner: ModularMetaLearner, place: Place, store: ImageStore) -> Decision:
    """Let a learner adapt to an episode, as in a test, and note what it decided."""
    episode = place.episode(store)
    support = episode_support(episode, hide=place.domain in learner.sources.domains)
    whole, each = learner.indicators(learner.situate(support))
    told = view_of(learner)
    told._modules["indicators"] = FixedIndicators(whole, each)  # once is enough
    seed_global(0, "decision", place.domain, place.draw, place.shots)
    adapted = told.adapt(support)
    return Decision(
        place.domain, place.shots, place.draw, whole.tolist(), each.tolist(), adapted.report["plan"],
        adapted.report["verdict"]["choice"], adapted.plan.gates.tolist(),
    )  # fmt: skip


def mean_plan(decisions: Sequence[Decision]) -> Plan:
    """Return the mean of plans: rates and strengths of the ridge, whose logarithms are decided, by geometric means."""
    plans = [Plan.from_dict(decision.plan) for decision in decisions]

    def mean(name: str) -> Tensor:
        values = torch.stack([getattr(plan, name) for plan in plans]).double()
        return (values.log().mean(0).exp() if name in ("rates", "ridge") else values.mean(0)).float()

    names = ("gates", "rates", "decay", "bank", "ridge", "gain", "gain_log_variance")
    return Plan(units=plans[0].units, **{name: mean(name) for name in names})


def quantities(decision: Decision, learns: Sequence[bool]) -> dict[str, list[float]]:
    """Return what is decided, by name, in the scales that it is decided on.

    Args:
        decision: of one episode.
        learns: of every unit, whether it takes gradient steps; the others' rates mean nothing.
    """
    plan = decision.plan
    rates = [row for row, own in zip(plan["rates"], learns, strict=True) if own and row]
    found = {
        "gate": plan["gates"],
        "rate, log10": [float(np.log10(row).mean()) for row in rates],
        "strength of the head's ridge, log10": [float(np.log10(plan["ridge"]))],
        "forecast gain, nats": [plan["gain"]],
        "carried out at all (0 or 1)": [float(decision.choice != PRIOR)],
        "gate after the veto": decision.gates,
    }
    return {name: values for name, values in found.items() if values}


def decompose(values: np.ndarray) -> tuple[float, dict[str, float]]:
    """Return the standard deviation of a decision, and the shares of its variance, which sum to 1.

    A two-way analysis of variance of a balanced design, its sums of squares pooled over the units.

    Args:
        values: ``(domains, shots, draws, units)``.

    Returns:
        the deviation, a root mean square over units; shares by ``SOURCES``, none where nothing varies.
    """
    values = values - values.mean((0, 1, 2))
    domain, shots, cell = values.mean((1, 2)), values.mean((0, 2)), values.mean(2)
    total = float(np.square(values).mean((0, 1, 2)).sum())
    parts = [
        float(np.square(domain).mean(0).sum()),
        float(np.square(shots).mean(0).sum()),
        float(np.square(cell - domain[:, None] - shots[None]).mean((0, 1)).sum()),
        float(np.square(values - cell[:, :, None]).mean((0, 1, 2)).sum()),
    ]
    deviation = (total / values.shape[-1]) ** 0.5
    if deviation < 1e-6:  # the rounding of single precision
        return deviation, {}
    return deviation, {name: part / total for name, part in zip(SOURCES, parts, strict=True)}


def chance_shares(domains: int, shots: int, draws: int) -> dict[str, float]:
    """Return the shares that are expected where only episodes differ: degrees of freedom over all of them."""
    free = [domains - 1, shots - 1, (domains - 1) * (shots - 1), domains * shots * (draws - 1)]
    return {name: each / (domains * shots * draws - 1) for name, each in zip(SOURCES, free, strict=True)}


def variation(
    decisions: Mapping[Cell, Decision],
    domains: Sequence[str],
    shots: Sequence[int],
    draws: int,
    learns: Sequence[bool],
    ways: int,
) -> list[Result]:
    """Return for every quantity its deviation and the shares of its variance, over as many draws of each domain.

    Intervals are of the bootstrap over draws, within each domain, whose shots stay together.
    """
    table = [[[quantities(decisions[d, k, i], learns) for i in range(draws)] for k in shots] for d in domains]
    random = rng(0, "bootstrap", "variation")
    picks = random.integers(draws, size=(RESAMPLES, len(domains), 1, draws))
    rows, columns = np.arange(len(domains))[:, None, None], np.arange(len(shots))[None, :, None]
    count = len(domains) * len(shots) * draws
    record = partial(Result, "policy", "all", 0, ways)
    chance = chance_shares(len(domains), len(shots), draws)
    results = [record(f"chance/{part}", share, share, share, count) for part, share in chance.items()]
    for name in table[0][0][0]:
        values = np.array([[[cell[name] for cell in by_shots] for by_shots in by_domain] for by_domain in table])
        deviation, shares = decompose(values)
        again = [decompose(values[rows, columns, pick]) for pick in picks]
        figures = {"deviation": (deviation, [each[0] for each in again])}
        for part, share in shares.items():
            figures[part] = share, [found[part] for _, found in again if found] or [share]
        for part, (value, resampled) in figures.items():
            found = bootstrap_interval(value, torch.tensor(resampled, dtype=torch.double))
            results.append(record(f"{name}/{part}", *found, count))
    return results


def use_of_units(
    decisions: Mapping[Cell, Decision], domains: Sequence[str], shots: Sequence[int], ways: int
) -> list[Result]:
    """Return per domain and number of shots the mean gate of each unit after the veto, and how often it chose what."""
    results = []
    for domain in domains:
        for k in shots:
            mine = sorted((d for d in decisions.values() if (d.domain, d.shots) == (domain, k)), key=lambda d: d.draw)
            weights = episode_weights(len(mine), rng(0, "bootstrap", domain, k), RESAMPLES)
            gates = weights @ np.array([decision.gates for decision in mine])
            figures = {f"gate/{unit}": gates[:, row] for row, unit in enumerate(mine[0].plan["units"])}
            for choice in CHOICES:
                figures[f"choice/{choice}"] = weights @ np.array([float(d.choice == choice) for d in mine])
            for metric, figure in figures.items():
                results.append(Result("policy", domain, k, ways, metric, *interval(figure), len(mine)))
    return results
