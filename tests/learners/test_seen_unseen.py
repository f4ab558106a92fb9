"""Accuracies on seen and unseen classes, and their harmonic mean."""

import math

import pytest
import torch
from torch import Tensor

from modmeta.evaluation.results import seen_unseen_table
from modmeta.learners.metrics import Result
from modmeta.learners.seen_unseen import SeenUnseenMetrics, harmonic_interval, seen_unseen


def logits(predicted: list[int], ways: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), ways).double()


def test_every_class_weighs_the_same() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3])
    found = seen_unseen(logits([0, 0, 0, 1, 0, 2, 3, 3], 4), labels, [True, True, False, False])
    assert found == {"seen_accuracy": pytest.approx((0.75 + 0) / 2), "unseen_accuracy": pytest.approx((0.5 + 1) / 2)}


def test_a_side_without_images_has_no_figure() -> None:
    labels = torch.tensor([0, 1])
    assert seen_unseen(logits([0, 0], 3), labels, [True, True, False]) == {"seen_accuracy": 0.5}
    assert seen_unseen(logits([0, 0], 3), labels, [False, False, True]) == {"unseen_accuracy": 0.5}


def figures(sides: list[dict[str, float]]) -> dict[str, Result]:
    metrics = SeenUnseenMetrics(["none"], ["ink"], [0], {})
    for index, facts in enumerate(sides):
        metrics.update("ink", 0, index, torch.tensor([0, 1]), {"none": logits([0, 1], 2)}, {"none": facts})
    return {result.metric: result for result in metrics.compute()}


def test_the_harmonic_mean_is_that_of_the_means_over_episodes() -> None:
    found = figures([{"seen_accuracy": s, "unseen_accuracy": u} for s, u in ((1.0, 0.0), (0.8, 0.4), (0.6, 0.2))])
    assert found["seen_accuracy"].value == pytest.approx(0.8)
    assert found["unseen_accuracy"].value == pytest.approx(0.2)
    mean = found["harmonic_mean"]
    assert mean.value == pytest.approx(2 * 0.8 * 0.2 / 1.0)
    assert 0.0 <= mean.low <= mean.value <= mean.high <= 2 * 0.8 * 0.4 / 1.2 + 1e-6
    assert (mean.episodes, mean.ways, mean.shots) == (3, 2, 0)


def test_episodes_without_a_side_count_for_the_other_alone() -> None:
    found = figures([{"seen_accuracy": 1.0}, {"seen_accuracy": 0.5, "unseen_accuracy": 0.5}])
    assert (found["seen_accuracy"].value, found["seen_accuracy"].episodes) == (0.75, 2)
    assert (found["harmonic_mean"].value, found["harmonic_mean"].episodes) == (0.5, 1)
    assert "harmonic_mean" not in figures([{"seen_accuracy": 1.0}])
    assert figures([{"seen_accuracy": 0.0, "unseen_accuracy": 0.0}])["harmonic_mean"].value == 0.0


def test_the_bootstrap_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        values = torch.rand(40, 2, generator=generator, dtype=torch.double)
        _, low, high = harmonic_interval(values)
        covered += low <= 0.5 <= high
    assert covered >= 95 - 4 * math.sqrt(100 * 0.95 * 0.05)


def test_the_table_shows_every_system_that_knows_both_sides() -> None:
    record = ("paper", 0, 10)
    results = [
        Result("none", *record, name, value, value - 0.1, value + 0.1, 5)
        for name, value in (("seen_accuracy", 0.6), ("unseen_accuracy", 0.3), ("harmonic_mean", 0.4))
    ]
    table = seen_unseen_table([*results, Result("source", *record, "accuracy", 0.5, 0.4, 0.6, 5)])
    assert table.row_count == 1
    assert [next(iter(column.cells)) for column in table.columns] == [
        "paper", "0", "none", "60.0", "30.0", "40.0 [30.0, 50.0]",
    ]  # fmt: skip
