"""The action grid against the learner's own way, its parts, and the gap on tables whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adapters import UnitConfig
from modmeta.data import DigitsDomains, DomainDataModule
from modmeta.errors import ModmetaError
from modmeta.evaluation import action_grid
from modmeta.evaluation.action_gap import CONSTANT, CROSSED, NONE, ORACLE, PER_DOMAIN, TRANSFERRED, bands, gap_results
from modmeta.evaluation.action_gap import predictability as predict
from modmeta.evaluation.action_grid import episode_rows, grid_actions, log_actions, table_header
from modmeta.evaluation.gap_report import report_gap
from modmeta.learners import BackboneConfig, ModularMetaLearner, SourceConfig
from modmeta.learners.action_table import Action, ActionTable, part_file, read_table
from modmeta.learners.measuring import episode_support
from modmeta.learners.source import SourcePhase

UNITS = (UnitConfig("norm_blend"), UnitConfig("film", group="stage", depth=(0.5, 1.0)))


@pytest.fixture(scope="module")
def data(digits: DigitsDomains) -> DomainDataModule:
    made = DomainDataModule(
        test_domains=["neon", "paper"], ways=3, shots=(2, 3), eval_shots=[2], queries=3, test_episodes=2
    )
    made.store = digits
    made.setup("test")
    return made


@pytest.fixture(scope="module")
def modular(data: DomainDataModule) -> ModularMetaLearner:
    torch.manual_seed(0)
    backbone = BackboneConfig("test_efficientnet", pretrained=False, image_size=32)
    indicators = ["task", "feature_shift", "difficulty", "norm_shift", "place"]
    made = ModularMetaLearner(backbone, UNITS, steps=2, source_images=5, indicators=indicators).eval()
    batches = ((domain, images, labels) for domain, images, labels, _ in data.source_images(5))
    made.sources.measure(made.model.backbone, batches, data.classes)
    # A bank that is not the identity, as after meta-training.
    with torch.no_grad():
        for parameter in made.bank.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made


def few(actions: list[Action]) -> list[Action]:
    wanted = ("none", "statistics 0.3", "film early x1", "film early x3", "statistics 0.3 + film x1")
    return [action for action in actions if action.name.split(", ridge")[0] in wanted]


def test_the_grid_holds_what_it_says(modular: ModularMetaLearner) -> None:
    units = modular.model.units
    actions = grid_actions(units)
    names = [action.name for action in actions]
    assert len(set(names)) == len(names) == len({(a.gates, a.rates, a.ridge) for a in actions})
    reads = [unit.name for unit in units if not unit.learns]
    films = [index for index, unit in enumerate(units) if unit.learns]
    # Nothing; units alone, together, early and late at three gates; film in three ranges (or fewer where two of them
    # are the same units) at three rates; statistics at three gates with film; all at three ridges.
    ranges = 3 if len(films) > 1 else 1
    assert len(actions) == 3 * (1 + 3 * (len(reads) + 3) + 3 * ranges + 3)
    assert [action.name for action in actions if action.idle] == ["none"]
    together = next(action for action in actions if action.name == "statistics 0.6 + film x1")
    assert together.gates == tuple(1.0 if unit.learns else 0.6 for unit in units)
    assert together.rates == tuple(unit.rate if unit.learns else 0.0 for unit in units)
    fast = next(action for action in actions if action.name == "film late x3, ridge x0.3")
    assert [fast.rates[index] > 0 for index in films] == [False] * ((len(films) + 1) // 2) + [True] * (len(films) // 2)
    assert (max(fast.rates), fast.ridge) == (pytest.approx(3 * units[films[0]].rate), 0.3)
    # A unit in one place only is not there twice.
    assert len(grid_actions([units[films[0]]])) == 3 * (1 + 3)


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_what_the_learner_itself_makes_of_the_plans(
    modular: ModularMetaLearner, data: DomainDataModule, split: str
) -> None:
    actions = few(grid_actions(modular.model.units))
    header = table_header(modular, data, split, actions, 8)
    episode = data.episode(split, 1)
    rows = episode_rows(modular, episode, actions, header)
    support = episode_support(episode, hide=split == "train")
    assert [row["action"] for row in rows] == [action.name for action in actions]
    for action, row in zip(actions, rows, strict=True):
        gates, rates = torch.tensor(action.gates), torch.tensor(action.rates)[:, None].expand(-1, 2)
        plan = replace(modular.idle_plan(), gates=gates, rates=rates)
        state, _ = modular.carry_out(plan, support)
        with torch.no_grad():
            features = modular.model(support.images, state, plan.gate_of())
            head = modular.fit_head(features, support, ridge=torch.tensor(action.ridge))
            logits = head(modular.model(episode.query, state, plan.gate_of()))
        assert row["nll"] == pytest.approx(float(F.cross_entropy(logits, episode.query_labels)), rel=1e-4)
        accuracy = float((logits.argmax(1) == episode.query_labels).double().mean())
        assert row["accuracy"] == pytest.approx(accuracy)
        assert (row["backward_macs"] > 0) == any(action.rates)
        assert row["tempered_nll"] <= row["nll"] + 1e-6
        halves = [episode.query_labels[half::2].numel() for half in (0, 1)]
        assert np.average(row["half_nll"], weights=halves) == pytest.approx(row["nll"])
        assert np.average(row["half_accuracy"], weights=halves) == pytest.approx(row["accuracy"])
    whole, each = modular.indicators.raw(modular.situate(support))
    seen = [rows[0][name] for name in action_grid.indicator_columns(header)]
    assert seen == pytest.approx([*whole.tolist(), *each.flatten().tolist()])
    if split == "train":  # the own domain is not among the sources
        known, _ = modular.indicators.raw(modular.situate(replace(support, hidden=None)))
        assert not torch.allclose(known, whole)


def test_what_trained_the_backbone_is_no_part_of_the_learner(
    modular: ModularMetaLearner, data: DomainDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    actions = grid_actions(modular.model.units)[:3]
    loaded = table_header(modular, data, "train", actions, 8)
    monkeypatch.setattr(modular, "phase", SourcePhase(SourceConfig(epochs=1), 4, 3, 2))
    assert any(name.startswith("phase.") for name in modular.state_dict())
    assert table_header(modular, data, "train", actions, 8) == loaded


def test_a_stopped_grid_goes_on_and_ends_like_one_that_was_not(
    modular: ModularMetaLearner, data: DomainDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = modular.model.units
    monkeypatch.setattr(action_grid, "grid_actions", lambda units: few(grid_actions(units))[:6])
    measured: list[int] = []

    def counted(learner: ModularMetaLearner, episode: Any, *rest: Any) -> list[dict[str, Any]]:
        measured.append(episode.index)
        return episode_rows(learner, episode, *rest)

    monkeypatch.setattr(action_grid, "episode_rows", counted)
    log_actions(modular, data, "test", 3, tmp_path / "one", per_part=2)
    first = part_file(tmp_path / "one", 0).read_bytes()
    log_actions(modular, data, "test", 4, tmp_path / "one", per_part=2)
    assert measured == [0, 1, 2, 2, 3]  # the part that was not whole is measured again
    assert part_file(tmp_path / "one", 0).read_bytes() == first
    log_actions(modular, data, "test", 4, tmp_path / "other", per_part=2)
    one, other = read_table(tmp_path / "one"), read_table(tmp_path / "other")
    assert one.episodes == other.episodes == (0, 1, 2, 3)
    assert one.domains == ("neon", "paper", "neon", "paper")
    for name, figure in one.figures.items():
        assert torch.equal(figure, other.figures[name]), name
    one.check(units, modular.indicators, 2)
    before = modular.head.log_ridge.detach().clone()
    with torch.no_grad():
        modular.head.log_ridge += 0.1
    with pytest.raises(ModmetaError, match="is of another learner; give another folder"):
        log_actions(modular, data, "test", 4, tmp_path / "one", per_part=2)
    with torch.no_grad():
        modular.head.log_ridge.copy_(before)
    with pytest.raises(ModmetaError, match="is of another split; give another folder"):
        log_actions(modular, data, "train", 4, tmp_path / "one", per_part=2)
    with pytest.raises(ModmetaError, match=r"raise data.test_episodes or lower --episodes"):
        log_actions(modular, data, "test", 5, tmp_path / "one", per_part=2)


# ---------------------------------------------------------------------- the gap


def table_of(accuracy: Tensor, domains: str, seen: Tensor | None = None, shots: int = 5) -> ActionTable:
    """A table of 1 - accuracy as losses; ``accuracy`` is ``(E, A)``, or ``(E, A, 2)`` by halves of the query."""
    halves = accuracy if accuracy.ndim == 3 else accuracy[..., None].expand(-1, -1, 2)
    whole, count = halves.mean(2).double(), len(accuracy)
    actions = [Action("none", (0.0,), (0.0,), 1.0)]
    actions += [Action(f"a{i}", (0.3 * i,), (0.0,), 1.0) for i in range(1, accuracy.shape[1])]
    header = {
        "units": [{"name": "u", "depth": 0.0, "learns": False, "reads": True, "rate": 0.1}],
        "indicators": {"global": ["s"], "unit": []}, "split": "train", "data": {"seed": 0},
    }  # fmt: skip
    figures = {"nll": 1 - whole, "tempered_nll": 1 - whole, "accuracy": whole, "half_accuracy": halves.double()}
    figures |= {"half_nll": 1 - halves.double(), "half_tempered_nll": 1 - halves.double()}
    return ActionTable(
        header, tuple(actions), tuple(range(count)), tuple(domains), torch.full((count,), shots),
        torch.full((count,), 3), torch.zeros(count, 1) if seen is None else seen[:, None], torch.zeros(count, 1, 0),
        figures,
    )  # fmt: skip


def test_every_choice_is_what_its_name_says() -> None:
    # Domain x: action 1 helps every time; domain y: action 1 harms more, action 2 helps in one episode of two.
    accuracy = torch.tensor([[0.5, 0.8, 0.4], [0.5, 0.8, 0.4], [0.5, 0.1, 0.7], [0.5, 0.1, 0.3]])
    results = {(r.system, r.domain, r.metric): r for r in gap_results(table_of(accuracy, "xxyy"))}
    expected = {  # mean accuracies: none .5, action 1 .45, action 2 .45; both halves tell the same
        NONE: (0.5, 0.5), CONSTANT: (0.5, 0.5), TRANSFERRED: (0.5, 0.1), PER_DOMAIN: (0.8, 0.5),
        ORACLE: (0.8, 0.6), CROSSED: (0.8, 0.6),
    }  # fmt: skip
    for system, (x, y) in expected.items():
        found = [results[system, domain, "accuracy"].value for domain in ("x", "y", "mean")]
        assert found == pytest.approx([x, y, (x + y) / 2]), system
    gap = results[f"{ORACLE} - {CONSTANT}", "y", "accuracy_difference"]
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.1, 0.0, 0.2))
    assert (gap.episodes, gap.shots, gap.ways) == (2, 5, 3)


def test_on_noise_the_oracle_sees_a_gap_that_the_cross_fitted_one_does_not() -> None:
    halves = torch.rand(400, 30, 2, generator=torch.Generator().manual_seed(0))
    results = {(r.system, r.domain, r.metric): r for r in gap_results(table_of(halves, "xy" * 200))}
    assert results[f"{ORACLE} - {CONSTANT}", "mean", "accuracy_difference"].low > 0.25
    crossed = results[f"{CROSSED} - {CONSTANT}", "mean", "accuracy_difference"]
    assert crossed.high < 0.03


def test_the_value_model_is_judged_on_domains_that_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.rand(90, generator=generator) * 2 - 1
    helpful = torch.stack([torch.full((90,), 0.5), 0.5 + 0.2 * signal], dim=1)
    found = predict(table_of(helpful, "xyz" * 30, signal))
    assert found is not None
    assert found.r2[0] > 0.9
    assert found.ratio[2] < 0.3
    assert float((found.choices == (signal > 0).long()).double().mean()) > 0.9
    noise = 0.5 + 0.2 * torch.randn(90, 2, generator=generator)
    nothing = predict(table_of(noise, "xyz" * 30, signal))
    assert nothing is not None
    assert nothing.r2[0] < 0.1
    # The sign of what the signal means turns over in the third domain: there it must not be foreseen.
    turned = torch.where(torch.arange(90) % 3 == 2, -signal, signal)
    foreign = predict(table_of(torch.stack([torch.full((90,), 0.5), 0.5 + 0.2 * turned], 1), "xyz" * 30, signal))
    assert foreign is not None
    assert foreign.r2[0] < found.r2[0] - 0.5
    assert predict(table_of(helpful, "x" * 90, signal)) is None


def test_many_numbers_of_shots_are_told_by_octaves() -> None:
    assert [str(band) for band in bands(torch.tensor([1, 5, 10, 5]))] == ["1", "5", "10"]
    assert [str(band) for band in bands(torch.arange(1, 11))] == ["1", "2-3", "4-7", "8-10"]


def test_the_report_is_written_whole_and_gives_both_verdicts(tmp_path: Path) -> None:
    signal = torch.linspace(-1, 1, 60)
    accuracy = torch.stack([torch.full((60,), 0.5), 0.5 + 0.2 * signal], dim=1)
    found = report_gap(table_of(accuracy, "xy" * 30, signal), tmp_path)
    assert found["E0"]["oracle"]["passed"]
    assert found["E1"]["passed"]
    assert {path.name for path in tmp_path.iterdir()} == {"gap.md", "results.json", "verdict.json"}
    assert "NaN" not in (tmp_path / "verdict.json").read_text()
    assert "## x, 5 shots, 30 episodes" in (tmp_path / "gap.md").read_text()
    flat = report_gap(table_of(torch.full((60, 2), 0.5), "xy" * 30, signal), tmp_path)
    assert not flat["E0"]["oracle"]["passed"]
    assert not flat["E1"]["passed"]
