import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from modmeta.errors import ModmetaError
from modmeta.search.space import read_space
from modmeta.search.study import Study, Trial

SPACE = read_space({
    "rate": {"low": 1e-4, "high": 1.0, "log": True}, "steps": {"low": 1, "high": 9}, "head": ["a", "b", None],
}, "")  # fmt: skip


def measure(values: dict[str, Any]) -> float | None:
    """Fails for many steps; best at rate 0.1, 3 steps, head b."""
    if values["steps"] > 7:
        return None
    return -abs(math.log10(values["rate"]) + 1) - 0.2 * abs(values["steps"] - 3) + (values["head"] == "b")


def study(path: Path, **changes: Any) -> Study:
    options = {"settings": {"metric": "val/gain", "config": {"a": (1, 2)}}, "maximize": True, "seed": 0} | changes
    return Study(path, SPACE, **options)


def go_on(found: Study, trials: int) -> Study:
    while len(found.trials) < trials:
        values = found.suggest()
        result = measure(values)
        if result is None:
            found.add(Trial(len(found.trials), values, None, "too many steps"))
        else:
            found.add(Trial(len(found.trials), values, result if found.maximize else -result))
    return found


def test_a_study_that_is_started_anew_after_every_trial_is_the_same(tmp_path: Path) -> None:
    whole = go_on(study(tmp_path / "whole.json"), 25)
    for trials in range(1, 26):
        parts = go_on(study(tmp_path / "parts.json"), trials)
    assert parts.trials == whole.trials
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert {trial.result is None for trial in whole.trials} == {True, False}
    assert go_on(study(tmp_path / "other.json", seed=1), 25).trials != whole.trials


def test_it_learns_from_its_trials(tmp_path: Path) -> None:
    found = go_on(study(tmp_path / "trials.json"), 60)
    results = [trial.result for trial in found.trials if trial.result is not None]
    assert sum(results[-20:]) / 20 > sum(results[:10]) / 10 + 0.5  # the first ten are random


def test_the_smallest_result_can_be_the_best(tmp_path: Path) -> None:
    largest = go_on(study(tmp_path / "largest.json"), 20)
    smallest = go_on(study(tmp_path / "smallest.json", maximize=False), 20)
    assert largest.best is not None
    assert smallest.best is not None
    assert smallest.best.values == largest.best.values
    assert smallest.best.result == -max(t.result for t in largest.trials if t.result is not None)


def test_no_best_without_a_result(tmp_path: Path) -> None:
    found = study(tmp_path / "trials.json")
    found.add(Trial(0, found.suggest(), None, "diverged"))
    assert found.best is None
    assert study(tmp_path / "trials.json").trials[0].reason == "diverged"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"maximize": False}, "direction"),
        ({"settings": {"metric": "val/nll", "config": {"a": [1, 2]}}}, "metric"),
    ],
)
def test_a_file_of_another_study(tmp_path: Path, change: dict, key: str) -> None:
    path = tmp_path / "trials.json"
    go_on(study(path), 2)
    before = path.read_bytes()
    with pytest.raises(ModmetaError, match=f"is of a study with another {key}"):
        study(path, **change)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", '{"settings": {}}', '{"settings": {}, "trials": [{"numb": 1}]}'])
def test_a_file_that_is_no_study(tmp_path: Path, text: str) -> None:
    (tmp_path / "trials.json").write_text(text)
    with pytest.raises(ModmetaError, match="is no record of a study"):
        study(tmp_path / "trials.json")
    assert (tmp_path / "trials.json").read_text() == text


def test_no_number_that_is_not_finite_gets_into_the_file(tmp_path: Path) -> None:
    found = study(tmp_path / "trials.json")
    with pytest.raises(ValueError, match="the result of trial 0 is nan"):
        found.add(Trial(0, found.suggest(), math.nan))
    assert not found.trials
    found.add(Trial(0, found.suggest(), 0.5))
    assert json.loads(found.path.read_text())["trials"][0]["result"] == 0.5


def test_another_process_at_the_same_study_loses_nothing(tmp_path: Path) -> None:
    mine, other = study(tmp_path / "trials.json"), study(tmp_path / "trials.json")
    go_on(other, 2)
    before = other.path.read_bytes()
    with pytest.raises(ModmetaError, match="was changed by another process"):
        go_on(mine, 1)
    assert other.path.read_bytes() == before
