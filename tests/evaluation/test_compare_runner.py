"""A comparison that was stopped and goes on ends like one that was not; what goes wrong is told with its place."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import compared
import pytest
import torch
from torch import Tensor

from modmeta.adaptation import HEADS, DivergedError, Support
from modmeta.data import DigitsDomains
from modmeta.errors import ModmetaError
from modmeta.evaluation.compare import Comparison, Row, RowFile, run_comparison
from modmeta.evaluation.compare.runner import another_place, flip_labels, make_task
from modmeta.evaluation.systems.system import Outcome, System, Task
from modmeta.learners import MetaLearner


class Head(System):
    """A head on frozen features, with noise from the global generator."""

    def __init__(self, head: str = "ridge", noise: float = 0.0) -> None:
        self.head, self.noise = HEADS.get(head)(), noise

    def adapt(self, task: Task) -> Outcome:
        classifier = self.learner.fit_head(task.features, task.support, self.head)
        noise = self.noise * torch.randn(task.support.ways)
        return Outcome(lambda query: classifier(query.query_features) + noise, parameters=10, backward_macs=20)


class Given(System):
    """Answers with what a function makes of the task."""

    def __init__(self, logits: Callable[[Task], Tensor]) -> None:
        self.logits = logits

    def adapt(self, task: Task) -> Outcome:
        return Outcome(self.logits)


class LooksAgain(Head):
    """Asks for the shared features twice."""

    def adapt(self, task: Task) -> Outcome:
        assert task.features.isfinite().all()
        return super().adapt(task)


class StopsAfter(Head):
    """Raises at its n-th adaptation."""

    def __init__(self, count: int) -> None:
        super().__init__("anchored_ridge")
        self.left = count

    def adapt(self, task: Task) -> Outcome:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().adapt(task)


def systems() -> dict[str, System]:
    return {"anchored_ridge": Head("anchored_ridge"), "other": Head(noise=0.5)}


@dataclasses.dataclass
class Bench:
    learner: MetaLearner
    digits: DigitsDomains
    folder: Path

    def run(self, comparison: Comparison, chosen: dict[str, System], name: str = "rows") -> list[Row]:
        wanted = comparison.domains, comparison.shots, comparison.episodes
        places = compared.manifest(self.digits, comparison).select(*wanted)
        rows = RowFile(self.folder / f"{name}.jsonl")
        run_comparison(comparison, chosen, places, self.digits, lambda domain: self.learner, rows)
        return [dataclasses.replace(row, seconds=0.0) for row in rows.rows.values()]

    def task(self, comparison: Comparison, number: int = 0) -> Task:
        place = compared.manifest(self.digits, comparison).places[number]
        return make_task(self.learner, place, self.digits, comparison)


@pytest.fixture
def bench(learner: MetaLearner, digits: DigitsDomains, tmp_path: Path) -> Bench:
    return Bench(learner, digits, tmp_path)


def test_each_system_is_measured_on_each_episode(bench: Bench) -> None:
    comparison = compared.settings()
    rows = bench.run(comparison, systems())
    assert len({row.key for row in rows}) == len(rows) == 2 * 2 * 2 * 3
    backbone = sum(p.numel() for p in bench.learner.model.backbone.parameters())
    for row in rows:
        assert (row.ways, row.parameters_updated, row.backward_macs) == (3, 10 / backbone, 20)
        assert sum(count for count, _, _ in row.bins) == 12
        assert sum(hits for _, _, hits in row.bins) == pytest.approx(12 * row.accuracy)
    # Against the learner's own way to the same figure.
    place = next(p for p in compared.manifest(bench.digits, comparison).places if p.shots == 2)
    episode = place.episode(bench.digits)
    features, query = (bench.learner.prior_features(each) for each in (episode.support, episode.query))
    support = Support(episode.support, episode.support_labels, episode.classes)
    logits = bench.learner.fit_head(features, support)(query).detach()
    row = next(r for r in rows if r.key == ("anchored_ridge", place.domain, 2, place.draw))
    assert row.accuracy == pytest.approx(float((logits.argmax(1) == episode.query_labels).double().mean()))
    assert row.nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits, episode.query_labels)), rel=1e-4)


@pytest.mark.fault(38)
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_stopped_run_that_goes_on_ends_like_one_that_was_not_stopped(stop: int, bench: Bench) -> None:
    comparison = compared.settings()
    whole = bench.run(comparison, systems(), "whole")
    with pytest.raises(KeyboardInterrupt):
        bench.run(comparison, {"anchored_ridge": StopsAfter(stop), "other": Head(noise=0.5)}, "stopped")
    path = bench.folder / "stopped.jsonl"
    if stop:
        path.write_bytes(path.read_bytes()[:-9])  # and its last line is torn
    assert bench.run(comparison, systems(), "stopped") == whole


def test_systems_and_episodes_can_be_added(bench: Bench) -> None:
    large = compared.settings(episodes=3)
    whole = {row.key: row for row in bench.run(large, systems(), "whole")}
    small = compared.settings(episodes=1)
    bench.run(small, {"other": Head(noise=0.5)})
    assert len(RowFile(bench.folder / "rows.jsonl").rows) == 4
    found = bench.run(large, systems())
    assert {row.key: row for row in found} == whole


def test_nothing_is_loaded_where_nothing_is_missing(bench: Bench) -> None:
    comparison = compared.settings()
    before = bench.run(comparison, systems())
    refuses = Given(lambda task: pytest.fail("measured again"))
    bench.learner = None  # type: ignore[assignment]
    assert bench.run(comparison, {"anchored_ridge": refuses, "other": refuses}) == before


def nan(task: Task) -> Tensor:
    logits = torch.zeros(len(task.episode.query), task.support.ways)
    logits[3, 1] = float("nan") if (task.episode.domain, task.episode.index) == ("paper", 2) else 0.0
    return logits


def wrong_shape(task: Task) -> Tensor:
    return torch.zeros(2, 2)


def refuse(task: Task) -> Tensor:
    raise ModmetaError("no labels, no answer")


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("logits", "kind", "expected"),
    [
        (nan, DivergedError, "system 'other', domain 'paper', 1 shots, episode 2: its logits are not finite"),
        (wrong_shape, ModmetaError, r"system 'other', domain 'neon', 1 shots, episode 0: logits \(2, 2\)"),
        (refuse, ModmetaError, "system 'other', domain 'neon', 1 shots, episode 0: no labels, no answer"),
    ],
)
def test_a_failure_names_its_place(logits, kind: type[Exception], expected: str, bench: Bench) -> None:
    with pytest.raises(kind, match=expected):
        bench.run(compared.settings(), {"anchored_ridge": Head("anchored_ridge"), "other": Given(logits)})


@pytest.mark.fault(29)
def test_learners_that_do_not_fit(bench: Bench) -> None:
    trained_on = compared.settings(checkpoints={"ink": "ink.ckpt"})
    with pytest.raises(ModmetaError, match=r"ink\.ckpt was trained on domain 'ink'; give the one that it was held out"):
        bench.run(trained_on, systems())
    bench.digits = DigitsDomains(16)
    with pytest.raises(ModmetaError, match=r"a\.ckpt is for images of 32 pixels"):
        bench.run(compared.settings(data={**compared.DATA, "image_size": 16}), systems())


def test_shared_features_are_charged_to_whoever_uses_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modmeta.evaluation.compare.runner._forward_seconds", lambda learner, store: 100.0)
    comparison = compared.settings(shots=[2], episodes=1)
    guess = Given(lambda task: torch.zeros(len(task.episode.query), task.support.ways))
    bench.run(comparison, {"anchored_ridge": Head("anchored_ridge"), "other": guess, "again": LooksAgain("ridge")})
    seconds = {row.key: row.seconds for row in RowFile(bench.folder / "rows.jsonl").rows.values()}
    assert seconds["anchored_ridge", "neon", 2, 0] == pytest.approx(100 * 6, abs=10)
    assert seconds["other", "neon", 2, 0] < 10
    assert seconds["again", "neon", 2, 0] == pytest.approx(100 * 6, abs=10)  # it has them already


@pytest.mark.parametrize(("share", "count"), [(0.2, 3), (0.5, 8), (1.0, 15)])
def test_exactly_the_share_of_labels_is_flipped(share: float, count: int, bench: Bench) -> None:
    truth = bench.task(compared.settings(shots=[5]))
    settings = compared.settings(shots=[5], flipped_labels=share)
    first, second = bench.task(settings), bench.task(settings)
    labels = first.support.labels
    assert labels is not None
    assert int((labels != truth.episode.support_labels).sum()) == count
    assert torch.equal(labels, second.support.labels)
    assert set(labels.tolist()) <= {0, 1, 2}
    assert torch.equal(first.episode.query_labels, truth.episode.query_labels)
    other = bench.task(settings, 1).support.labels
    if share < 1:
        assert not torch.equal(labels != truth.episode.support_labels, other != truth.episode.support_labels)


def test_a_larger_share_flips_the_same_and_more() -> None:
    support = Support(torch.zeros(6, 3, 1, 1), torch.tensor([0, 0, 1, 1, 2, 2]), ("a", "b", "c"))
    order, steps = [4, 0, 2, 5, 1, 3], [1, 2, 1, 2, 1, 2]
    half = flip_labels(support, 0.5, order, steps).labels
    assert half is not None
    assert half.tolist() == [1, 0, 2, 1, 0, 2]
    assert support.labels is not None
    assert support.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_unlabelled_support_has_no_labels(bench: Bench) -> None:
    assert bench.task(compared.settings(unlabelled=True)).support.labels is None


def test_another_episode_is_the_same_when_there_are_more(bench: Bench) -> None:
    for comparison in (compared.settings(), compared.settings(checkpoints={"neon": "a.ckpt"})):
        few = compared.manifest(bench.digits, comparison).places
        many = compared.manifest(bench.digits, dataclasses.replace(comparison, episodes=5)).places
        for place in few:
            other = another_place(place, few, comparison.domains)
            assert other is not None
            assert other != place
            assert other.shots == place.shots
            assert another_place(place, many, comparison.domains) == other
    lonely = compared.settings(checkpoints={"neon": "a.ckpt"}, episodes=1)
    places = compared.manifest(bench.digits, lonely).places
    assert another_place(places[0], places, lonely.domains) is None
