"""What cannot be compared, and which changes leave measured rows valid."""

from typing import Any

import compared
import pytest

from modmeta.errors import ModmetaError

TWO = {"anchored_ridge": {"system": "head"}, "other": {"system": "head"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"systems": {}}, "nothing to compare"),
        ({"episodes": 0}, "episodes=0 is too small"),
        ({"shots": []}, "must hold different numbers"),
        ({"shots": [1, 1]}, "must hold different numbers"),
        ({"flipped_labels": 1.5}, "must lie in 0..1"),
        ({"flipped_labels": 0.5, "unlabelled": True}, "has no labels to flip"),
        ({"seed": -1}, "seed=-1 is too small"),
        ({"checkpoints": "a.ckpt"}, "nothing to test on"),
        ({"data": {"test_domains": ["neon", "ink"]}}, "there is none for the test domain 'ink'"),
        ({"data": {"test_domains": ["neon"]}}, "unknown test domain 'paper' in checkpoints"),
        ({"checkpoints": {"mean": "a"}}, "cannot be called 'mean'"),
        ({"reference": "othr"}, "unknown system 'othr' in reference; did you mean 'other'?"),
        ({"differences": [("other", "anchred_ridge")]}, "in differences; did you mean 'anchored_ridge'?"),
        ({"oracles": {"o": ["othr"]}}, "in oracles.o; did you mean 'other'?"),
        ({"oracles": {"other": ["other"]}}, "oracles: 'other' is the name of a system already"),
        ({"oracles": {"o": ["other"]}, "best_constant": {"o": ["other"]}}, "best_constant: 'o' is the name"),
        ({"best_constant": {"k": []}}, "best_constant.k: the list is empty"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModmetaError) as error:
        compared.settings(**changes).check()
    assert expected in str(error.value)


def test_pairs_are_with_the_reference_unless_named() -> None:
    comparison = compared.settings(oracles={"o": ["other"]})
    comparison.check()
    assert comparison.pairs == [("other", "anchored_ridge"), ("o", "anchored_ridge")]
    assert compared.settings(differences=[("other", "other")]).pairs == [("other", "other")]


@pytest.mark.parametrize(
    "changes",
    [
        {"episodes": 9},
        {"systems": {**TWO, "new": {"system": "head"}}},
        {"reference": "other", "differences": [], "oracles": {"o": ["other"]}, "best_constant": {"k": ["other"]}},
        {"checkpoints": {"neon": "moved.ckpt", "paper": "b.ckpt"}, "output": "moved", "modules": ["moved.py"]},
        {"data": {**compared.DATA, "root": "moved", "cache_dir": "here", "num_workers": 2}},
    ],
)
def test_what_may_change(changes: dict[str, Any]) -> None:
    compared.settings(**changes).refuse_changes(compared.settings().to_dict())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"episodes": 2}, "episodes is not what"),
        ({"shots": [1]}, "shots is not what"),
        ({"flipped_labels": 0.2}, "0.0 then, 0.2 now"),
        ({"unlabelled": True}, "unlabelled is not what"),
        ({"seed": 1}, "seed is not what"),
        ({"accelerator": "cuda"}, "accelerator is not what"),
        ({"checkpoints": {"neon": "a.ckpt"}}, "the list of test domains is not what"),
        ({"systems": {"anchored_ridge": {"system": "head"}}}, "systems.other is not what"),
        ({"systems": {**TWO, "other": {"system": "head", "head": "ridge"}}}, "systems.other.head is not what"),
        ({"data": {**compared.DATA, "queries": 5}}, "data.queries is not what"),
    ],
)
def test_what_may_not_change(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModmetaError) as error:
        compared.settings(**changes).refuse_changes(compared.settings().to_dict())
    assert expected in str(error.value)
