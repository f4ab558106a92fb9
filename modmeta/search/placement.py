"""The search over the paths of a supernet: what a path gains on validation episodes, and the record of it all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from modmeta.adaptation import DivergedError, backward_shares
from modmeta.adapters import UnitConfig
from modmeta.adapters.units import resolve_units
from modmeta.data import DomainDataModule, Episode
from modmeta.data.seeding import seed_global
from modmeta.errors import ModmetaError
from modmeta.files import write_atomically
from modmeta.learners import SupernetLearner
from modmeta.learners.placements import Genome, Placements
from modmeta.search.evolution import Evolution, ranked

Progress = Callable[[int, int, int], None]
"""Is told the number of the generation, and how many of how many of its paths have been measured."""


@dataclass(frozen=True)
class Measured:
    """What came of one path.

    Attributes:
        genome: the path.
        open: names of the units that it opens.
        gain: mean decrease of the query loss against no adaptation of units, in nats; None if the path diverged.
        error: standard error of that mean over the episodes; 0 for one episode.
        accuracy: mean increase of the query accuracy.
        reason: why there is no gain.
    """

    genome: Genome
    open: tuple[str, ...]
    gain: float | None
    error: float = 0.0
    accuracy: float = 0.0
    reason: str = ""


class PlacementSearch:
    """Looks for the path of a trained supernet that gains most on validation episodes.

    After every generation the record is written, whole or not at all, and a search that was stopped goes on behind the
    last one.

    Args:
        learner: the trained supernet.
        episodes: the validation episodes.
        evolution: how paths are bred.
        budget: largest share of the backward multiply-accumulates of all candidates' steps that a path may take.
        record: file of what was measured.
        settings: what else the measurements depend on, as plain data; a record of other settings is refused.

    Raises:
        ModmetaError: if nothing can be chosen, or the record is of another search.
    """

    def __init__(
        self,
        learner: SupernetLearner,
        episodes: Sequence[Episode],
        evolution: Evolution,
        budget: float,
        record: Path,
        settings: Mapping[str, Any],
    ) -> None:
        if not 0.0 <= budget <= 1.0:
            raise ModmetaError(f"budget must lie in 0..1, got {budget}")
        self.learner = learner
        self.evolution = evolution
        self.record = record
        self.placements = affordable(learner, budget)
        if max(self.placements.sizes) == 1:
            raise ModmetaError(f"budget={budget} has no room for any candidate unit; give a larger one")
        breeding = {name: value for name, value in asdict(evolution).items() if name != "generations"}
        self.settings = _plain({**settings, **breeding, "budget": budget, "places": self.placements.places})
        self.generations = self._read()
        self._episodes = [episode.to(learner.device) for episode in episodes]
        self._before = [self._outcome((), episode) for episode in self._episodes]

    def run(self, progress: Progress) -> None:
        """Measure the generations that are missing."""
        while len(self.generations) < self.evolution.generations:
            number = len(self.generations)
            genomes = self.evolution.generation(number, self.placements.sizes, self._scores())
            if not genomes:  # every path has been measured
                return
            measured = []
            for done, genome in enumerate(genomes):
                progress(number, done, len(genomes))
                measured.append(self.measure(genome))
            self.generations.append(measured)
            self._write()

    @property
    def measured(self) -> dict[Genome, Measured]:
        """Everything that was measured, in that order."""
        return {each.genome: each for generation in self.generations for each in generation}

    def best(self) -> Measured:
        """Return the path with the largest gain.

        Raises:
            ModmetaError: if every path diverged.
        """
        measured = self.measured
        order = ranked(self._scores())
        if not order:
            reason = next(iter(measured.values())).reason
            raise ModmetaError(f"none of {len(measured)} placements could be measured; the first: {reason}")
        return measured[order[0]]

    def measure(self, genome: Genome) -> Measured:
        """Adapt along a path to every episode."""
        names = self.placements.open(genome)
        gains, accuracies = [], []
        for episode, (loss, accuracy) in zip(self._episodes, self._before, strict=True):
            try:
                after = self._outcome(names, episode)
            except DivergedError as error:
                return Measured(genome, names, None, reason=f"episode {episode.index}: {error}")
            gains.append(loss - after[0])
            accuracies.append(after[1] - accuracy)
        deviation = torch.tensor(gains).std().item() if len(gains) > 1 else 0.0
        count = len(gains)
        return Measured(genome, names, math.fsum(gains) / count, deviation / count**0.5, math.fsum(accuracies) / count)

    @torch.no_grad()
    def _outcome(self, names: Sequence[str], episode: Episode) -> tuple[float, float]:
        """Return query loss and accuracy of an episode with some units adapted."""
        seed_global(self.evolution.seed, "placement episode", episode.index)
        logits = self.learner.path_logits(names, episode).double()
        if not torch.isfinite(logits).all():
            raise DivergedError("the logits are not finite")
        hits = (logits.argmax(-1) == episode.query_labels).double().mean()
        return float(F.cross_entropy(logits, episode.query_labels)), float(hits)

    def _scores(self) -> dict[Genome, float | None]:
        return {genome: each.gain for genome, each in self.measured.items()}

    def _write(self) -> None:
        generations = [[asdict(each) for each in generation] for generation in self.generations]
        content = {"settings": self.settings, "generations": generations}
        write_atomically(self.record, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def _read(self) -> list[list[Measured]]:
        if not self.record.exists():
            return []
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
            settings, generations = content["settings"], content["generations"]
            rows = [[{**r, "genome": tuple(r["genome"]), "open": tuple(r["open"])} for r in g] for g in generations]
            found = [[Measured(**row) for row in generation] for generation in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModmetaError(f"{self.record} is no record of a search ({error}); choose another --output") from error
        for key in self.settings.keys() | settings.keys():
            if self.settings.get(key) != settings.get(key):
                raise ModmetaError(
                    f"{self.record} is of a search with another {key}; give the same one to go on, or another --output"
                )
        return found


def affordable(learner: SupernetLearner, budget: float) -> Placements:
    """Return the placements of a supernet that a budget has room for.

    A step pays for everything behind the earliest unit that it moves, so a path costs as much as the dearest of its
    units, and fits where each of them does.

    Args:
        learner: the supernet.
        budget: share of the backward multiply-accumulates of steps on all candidates, 0 (no gradient) to 1.
    """
    shares = backward_shares(learner.model)
    return learner.placements.within([u.name for u in learner.model.units if shares.get(u.name, 0.0) <= budget])


def validation_episodes(data: DomainDataModule) -> Iterator[Episode]:
    """Yield every validation episode of a data module."""
    index = 0
    while True:
        try:
            episode = data.episode("val", index)
        except IndexError:
            return
        yield episode
        index += 1


def chosen_units(learner: SupernetLearner, names: Sequence[str]) -> list[UnitConfig]:
    """Return the configuration of some of a supernet's units, as a fit takes it.

    Args:
        learner: the supernet.
        names: of the units.
    """
    units, found = iter(learner.model.units), []
    for config in learner.unit_configs:
        own = [next(units) for _ in resolve_units(learner.model.backbone, [config])]
        kept = [unit for unit in own if unit.name in names]
        if kept:
            sites = [site.name for unit in kept for site in unit.sites]
            found.append(replace(config, names=config.names if len(kept) == len(own) else sites))
    return found


def _plain(value: Any) -> Any:
    """Return data as it will be read from a file."""
    return json.loads(json.dumps(value))
