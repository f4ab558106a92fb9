"""What is compared, and which changes of it leave the rows that were measured before valid."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from modmeta.errors import ModmetaError, unknown

MEAN = "mean"
"""The place of a domain's name in figures that are means over the domains."""

_REPORT = ("reference", "differences", "oracles", "best_constant")
"""What only the report depends on."""
_PLACES = ("output", "checkpoints", "modules")
"""Where things lie; what lies there is checked by its content."""
_DATA_PLACES = ("root", "cache_dir", "num_workers", "test_domains")


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison.

    Args:
        checkpoints: for each test domain a checkpoint that it was held out of, or one for all domains.
        systems: name -> ``system``, its registered name, and its options.
        episodes: draws per domain and number of shots.
        shots: support images per class.
        flipped_labels: share of the support labels that are turned into another class.
        unlabelled: whether the systems get the support without labels.
        reference: the system that gains and harm are relative to.
        differences: pairs of systems to compare with each other; default: each with the reference.
        oracles: name -> systems of which the one with the least query loss is taken, per episode.
        best_constant: name -> systems of which the one with the least mean query loss is taken, per number of shots.
        output: folder of the rows, figures and report; default: ``runs/compare/`` and the configuration's name.
        seed: fixes the episodes, the flipped labels and the bootstrap.
        accelerator: where to compute.
        modules: Python files with the user's own modules, learners and systems.
        data: arguments of the data module.
    """

    checkpoints: str | dict[str, str]
    systems: dict[str, dict[str, Any]]
    episodes: int = 50
    shots: list[int] = field(default_factory=lambda: [1, 5, 10])
    flipped_labels: float = 0.0
    unlabelled: bool = False
    reference: str = "anchored_ridge"
    differences: list[tuple[str, str]] | None = None
    oracles: dict[str, list[str]] = field(default_factory=dict)
    best_constant: dict[str, list[str]] = field(default_factory=dict)
    output: str | None = None
    seed: int = 0
    accelerator: Literal["cpu", "cuda"] = "cpu"
    modules: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def domains(self) -> tuple[str, ...]:
        """The test domains."""
        named = self.data.get("test_domains")
        return tuple(dict.fromkeys(named or (self.checkpoints if isinstance(self.checkpoints, dict) else ())))

    @property
    def pseudo_systems(self) -> tuple[str, ...]:
        """The names of what is chosen among systems in hindsight."""
        return (*self.oracles, *self.best_constant)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of systems to report differences of."""
        if self.differences is not None:
            return list(self.differences)
        return [(name, self.reference) for name in (*self.systems, *self.pseudo_systems) if name != self.reference]

    def checkpoint(self, domain: str) -> str:
        """Return the checkpoint that a domain is tested with."""
        return self.checkpoints if isinstance(self.checkpoints, str) else self.checkpoints[domain]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as it would be read from a file."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    def check(self) -> None:
        """Refuse what can be seen to be wrong before any data is read.

        Raises:
            ModmetaError: naming the key.
        """
        if not self.systems:
            raise ModmetaError("systems: there is nothing to compare; name one system or more")
        if self.episodes < 1:
            raise ModmetaError(f"episodes={self.episodes} is too small; it must be 1 or more")
        if not self.shots or min(self.shots) < 1 or len(set(self.shots)) < len(self.shots):
            raise ModmetaError(f"shots={self.shots} must hold different numbers from 1 up")
        if not 0 <= self.flipped_labels <= 1:
            raise ModmetaError(f"flipped_labels={self.flipped_labels} must lie in 0..1")
        if self.unlabelled and self.flipped_labels:
            raise ModmetaError("unlabelled support has no labels to flip; set flipped_labels to 0")
        if self.seed < 0:
            raise ModmetaError(f"seed={self.seed} is too small; it must be 0 or more")
        self._check_domains()
        self._check_names()

    def _check_domains(self) -> None:
        if not self.domains:
            raise ModmetaError("there is nothing to test on; name data.test_domains, or a checkpoint per domain")
        if MEAN in self.domains:
            raise ModmetaError(f"a test domain cannot be called {MEAN!r}, which stands for all of them; rename it")
        if isinstance(self.checkpoints, dict):
            for domain in self.domains:
                if domain not in self.checkpoints:
                    raise ModmetaError(f"checkpoints: there is none for the test domain {domain!r}; add it")
            for domain in self.checkpoints:
                if domain not in self.domains:
                    raise unknown("test domain", domain, self.domains, "checkpoints")

    def _check_names(self) -> None:
        for where in ("oracles", "best_constant"):
            for name, members in getattr(self, where).items():
                taken = [*self.systems, *(self.oracles if where == "best_constant" else ())]
                if name in taken:
                    raise ModmetaError(f"{where}: {name!r} is the name of a system already; choose another")
                if not members:
                    raise ModmetaError(f"{where}.{name}: the list is empty; name systems to choose from")
                _check_known(members, self.systems, f"{where}.{name}")
        _check_known([self.reference], self.systems, "reference")
        for pair in self.differences or ():
            _check_known(pair, (*self.systems, *self.pseudo_systems), "differences")

    def refuse_changes(self, stored: Mapping[str, Any]) -> None:
        """Make sure that rows measured under stored settings are rows of these.

        Systems may have been added and the number of episodes may have grown. What only the report depends on
        may change, and so may the places of files, whose content is checked elsewhere.

        Raises:
            ModmetaError: naming the first key that differs.
        """
        new = self.to_dict()
        for name, options in stored["systems"].items():
            if name not in new["systems"]:
                raise _changed(f"systems.{name}", "there", "gone")
            _refuse_difference(options, new["systems"][name], f"systems.{name}.")
        before, after = Comparison(**stored).domains, self.domains
        if before != after:
            raise _changed("the list of test domains", list(before), list(after))
        if new["episodes"] < stored["episodes"]:
            raise _changed("episodes", stored["episodes"], new["episodes"])
        skipped = {*_REPORT, *_PLACES, "systems", "episodes", "data"}
        _refuse_difference(_without(stored, skipped), _without(new, skipped), "")
        _refuse_difference(_without(stored["data"], _DATA_PLACES), _without(new["data"], _DATA_PLACES), "data.")


def _check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise unknown("system", name, known, where)


def _without(settings: Mapping[str, Any], keys: Container[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def _refuse_difference(stored: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> None:
    for key in dict.fromkeys([*stored, *new]):
        if stored.get(key) != new.get(key):
            raise _changed(prefix + key, stored.get(key), new.get(key))


def _changed(key: str, before: Any, after: Any) -> ModmetaError:
    return ModmetaError(
        f"{key} is not what the rows in the output folder were measured with: {before!r} then, {after!r} now; "
        f"choose another output folder"
    )
