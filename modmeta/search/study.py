"""A study: trials of settings, each chosen by Optuna in view of those before, in one file that survives a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.files import write_atomically
from modmeta.search.space import Space, from_optuna, to_optuna


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it.

    Attributes:
        number: from 0.
        values: by dotted key.
        result: the metric; None if the trial failed.
        reason: why it failed.
        seconds: how long it took.
    """

    number: int
    values: dict[str, Any]
    result: float | None
    reason: str = ""
    seconds: float = 0.0


class Study:
    """Trials one after the other, the next one chosen in view of all that are finished.

    The file is written whole after every trial and holds nothing of one that is not finished. What is tried is a
    function of seed, number and results of the trials before, so a study that was killed and started again tries and
    finds what it would have without that, as far as its trials can be repeated. (In Optuna's own storages a trial that
    was killed runs for ever, and a study cannot go on with a journal that was cut off within a line.)

    Args:
        path: the file.
        space: what varies.
        settings: what the trials depend on, as plain data; a file of other settings is refused.
        maximize: whether the largest or the smallest result is the best one.
        seed: fixes what is tried.

    Raises:
        ModmetaError: if the file is of another study.
    """

    def __init__(self, path: Path, space: Space, settings: Mapping[str, Any], maximize: bool, seed: int) -> None:
        self.path = path
        self.space = space
        self.maximize = maximize
        self.seed = seed
        more = {"direction": "maximize" if maximize else "minimize", "seed": seed}
        self.settings = json.loads(json.dumps({**settings, **more}))
        self.trials = self._read()

    def suggest(self) -> dict[str, Any]:
        """Return the values to try next (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", 2011)."""
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            number = len(self.trials)
            sampler = TPESampler(seed=int(rng(self.seed, "trial", number).integers(2**32)), multivariate=True)
            study = optuna.create_study(sampler=sampler, direction="maximize" if self.maximize else "minimize")
            for trial in self.trials:
                state = TrialState.FAIL if trial.result is None else TrialState.COMPLETE
                values = to_optuna(self.space, trial.values)
                study.add_trial(create_trial(state=state, params=values, distributions=self.space, value=trial.result))
            return from_optuna(self.space, study.ask(self.space).params)
        finally:
            optuna.logging.set_verbosity(verbosity)

    def add(self, trial: Trial) -> None:
        """Keep a finished trial.

        Raises:
            ModmetaError: if another process has added one meanwhile.
        """
        if self._read() != self.trials:
            raise ModmetaError(f"{self.path} was changed by another process; let one at a time work on a study")
        if trial.number != len(self.trials):
            raise ValueError(f"trial {trial.number} is not the next one")
        if trial.result is not None and not math.isfinite(trial.result):
            raise ValueError(f"the result of trial {trial.number} is {trial.result}")
        self.trials.append(trial)
        content = {"settings": self.settings, "trials": [asdict(each) for each in self.trials]}
        write_atomically(self.path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    @property
    def best(self) -> Trial | None:
        """The best trial, the first of equal ones; None if none has a result."""
        done = [trial for trial in self.trials if trial.result is not None]
        sign = -1.0 if self.maximize else 1.0
        return min(done, key=lambda trial: sign * (trial.result or 0.0), default=None)

    def _read(self) -> list[Trial]:
        if not self.path.exists():
            return []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            settings, trials = content["settings"], [Trial(**each) for each in content["trials"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModmetaError(f"{self.path} is no record of a study ({error}); choose another --output") from error
        for key in self.settings.keys() | settings.keys():
            if self.settings.get(key) != settings.get(key):
                raise ModmetaError(
                    f"{self.path} is of a study with another {key}; give the same one to go on, or another --output"
                )
        return trials
