"""``benchmarks/policy_evidence.py``: what replaces the policy, and how its decisions are taken apart."""

import argparse
import copy
from pathlib import Path

import numpy as np
import policy_evidence
import pytest
import torch
from policy_conditions import NO_VETO, Told, switched_off, tampered
from policy_decisions import SOURCES, Decision, chance_shares, decide, decompose, mean_plan
from policy_evidence import Evidence, freeze, gather
from policy_tables import gates_plot, write_table

from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems import LearnerSystem, Task
from modmeta.evaluation.systems.learned import FixedIndicators, view_of
from modmeta.learners import ModularMetaLearner
from modmeta.learners.measuring import episode_support

DATA = {"root": "digits", "test_domains": ["neon"], "ways": 3, "queries": 2, "shots": 1}


@pytest.fixture(scope="module")
def deciding(modular: ModularMetaLearner) -> ModularMetaLearner:
    """Return a learner whose policy, drawn at random, says something else to every domain, and whose veto listens."""
    learner = view_of(modular)
    learner.veto, learner.veto_folds = True, 0  # quickly: by the forecast, and by what no label moves
    learner._modules["policy"] = policy = copy.deepcopy(modular.policy)
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.per_unit.weight, std=0.05)
    torch.nn.init.normal_(policy.head.weight, std=0.1)
    torch.nn.init.normal_(policy.forecast.weight, std=0.5)
    return learner


def options(folder: Path, episodes: int = 2) -> argparse.Namespace:
    (folder / "some.ckpt").write_bytes(b"weights")
    return argparse.Namespace(checkpoint=str(folder / "some.ckpt"), out=folder / "out", episodes=episodes, shots=[1, 2])


@pytest.fixture(scope="module")
def evidence(deciding: ModularMetaLearner, tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    data = dict(DomainDataModule(**DATA).hparams)
    return freeze(deciding, data, options(tmp_path_factory.mktemp("evidence")))


@pytest.fixture(scope="module")
def decisions(evidence: Evidence) -> dict[tuple[str, int, int], Decision]:
    places = [*evidence.tested, *(p for p in evidence.others if p.domain in ("ink", "chalk"))]
    return {(p.domain, p.shots, p.draw): decide(evidence.learner, p, evidence.store) for p in places}


def task_of(evidence: Evidence, draw: int = 0) -> Task:
    place = next(p for p in evidence.tested if (p.shots, p.draw) == (2, draw))
    episode = place.episode(evidence.store)
    return Task(evidence.learner, episode, episode_support(episode, hide=False))


@torch.no_grad()
def logits(system: LearnerSystem, task: Task) -> torch.Tensor:
    system.prepare(task.learner)
    return system.adapt(task).classify(task)


@pytest.mark.parametrize("part", SOURCES)
def test_each_effect_alone_is_found(part: str) -> None:
    random = np.random.default_rng(0)
    shape = {"domain": (5, 1, 1, 2), "shots": (1, 3, 1, 2), "domain x shots": (5, 3, 1, 2), "episode": (5, 3, 4, 2)}
    x = random.normal(size=shape[part])
    if part == "domain x shots":
        x = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean((0, 1))
    if part == "episode":
        x = x - x.mean(2, keepdims=True)
    _, shares = decompose(np.broadcast_to(x, (5, 3, 4, 2)))
    assert shares == pytest.approx({name: float(name == part) for name in SOURCES})


def test_shares_are_those_of_nested_regressions() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(4, 2, 6)) + random.normal(size=(4, 1, 1)) + random.normal(size=(1, 2, 1))
    d, k, _ = (index.ravel() for index in np.indices(x.shape))
    y = x.ravel()

    def explained(*factors: np.ndarray) -> float:
        design = np.concatenate([np.eye(factor.max() + 1)[factor] for factor in factors], axis=1)
        return 1 - float(np.var(y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) / np.var(y))

    deviation, shares = decompose(x[..., None])
    assert deviation == pytest.approx(float(y.std()))
    assert shares["domain"] == pytest.approx(explained(d))
    assert shares["shots"] == pytest.approx(explained(d, k) - explained(d))
    assert shares["episode"] == pytest.approx(1 - explained(2 * d + k))
    assert sum(shares.values()) == pytest.approx(1)
    noise = [decompose(random.normal(size=(4, 2, 6, 1)))[1] for _ in range(400)]
    for name, share in chance_shares(4, 2, 6).items():
        assert np.mean([each[name] for each in noise]) == pytest.approx(share, abs=0.02)


def test_a_constant_has_no_shares() -> None:
    assert decompose(np.full((3, 2, 4, 2), 0.3)) == (pytest.approx(0, abs=1e-12), {})


def test_told_its_own_indicators_the_policy_is_itself(
    evidence: Evidence, decisions: dict[tuple[str, int, int], Decision]
) -> None:
    task = task_of(evidence)
    mine, other = decisions["neon", 2, 0], decisions["ink", 2, 0]
    same = Told(lambda _: {"indicators": FixedIndicators(*mine.indicators)})
    assert torch.equal(logits(same, task), logits(LearnerSystem(), task))
    told = Told(lambda _: {"indicators": FixedIndicators(*other.indicators)})
    told.prepare(evidence.learner)
    learner = told.learner_for(task)
    assert learner.plan(learner.situate(task.support)).to_dict() == other.plan
    assert other.plan["gates"] != mine.plan["gates"]


def test_others_stand_in_and_nobody_for_himself(
    evidence: Evidence, decisions: dict[tuple[str, int, int], Decision]
) -> None:
    systems = tampered(evidence.learner, decisions, ["neon"], ["ink", "chalk"])
    for draw, stranger in enumerate(("ink", "chalk")):
        task = task_of(evidence, draw)
        for name, donor in (("episode", ("neon", 2, 1 - draw)), ("domain", (stranger, 2, 0))):
            system = systems[f"told of another {name}"]
            assert isinstance(system, Told)
            fixed = system.parts(task)["indicators"]
            torch.testing.assert_close(fixed(None), decisions[donor].indicators)
    mean = mean_plan([d for d in decisions.values() if d.domain == "neon"])
    own = [d.plan for d in decisions.values() if d.domain == "neon"]
    np.testing.assert_allclose(mean.gates, np.mean([plan["gates"] for plan in own], 0), rtol=1e-5)
    np.testing.assert_allclose(mean.rates, np.exp(np.mean(np.log([plan["rates"] for plan in own]), 0)), rtol=1e-5)
    for name, gates in (("mean plan", mean.gates), ("configured plan", None)):
        system = systems[name + NO_VETO]
        system.prepare(evidence.learner)
        adapted = system.learner_for(task_of(evidence)).adapt(task_of(evidence).support)
        configured = torch.tensor([unit.gate for unit in evidence.learner.model.units])
        torch.testing.assert_close(adapted.plan.gates, configured if gates is None else gates)


def test_what_is_switched_off_is_all_that_is(
    evidence: Evidence, decisions: dict[tuple[str, int, int], Decision]
) -> None:
    task, indicators = task_of(evidence), evidence.learner.indicators
    systems = switched_off(evidence.learner, decisions)
    assert set(systems) == {f"without {name}" for name in (*indicators.names, "all but place")}
    for name in indicators.names:
        system = systems[f"without {name}"]
        assert isinstance(system, Told)
        for per_unit, found, seen in zip(
            (False, True), system.parts(task)["indicators"](None), decisions["neon", 2, 0].indicators, strict=True
        ):
            for column, (owner, _) in enumerate(indicators.numbers(per_unit)):
                expected = torch.zeros_like(seen[..., column]) if owner == name else seen[..., column]
                assert torch.equal(found[..., column], expected)


def test_a_run_goes_on_and_ends_the_same(evidence: Evidence, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = gather(evidence, ["flipped"])
    found = {(r.system, r.shots, r.metric): r for r in first if r.domain == "mean"}
    for shots in (1, 2):
        clean, flipped = (found[f"prototype{end}", shots, "accuracy"].value for end in ("", ", flipped labels"))
        assert found["prototype", shots, "flipping/accuracy"].value == pytest.approx(flipped - clean)
        assert found["source", shots, "flipping/accuracy"].value == 0
    names = {r.metric.rpartition("/")[0] for r in first if r.domain == "all"}
    assert {"gate", "rate, log10", "carried out at all (0 or 1)", "gate after the veto"} < names
    monkeypatch.setattr(policy_evidence, "run_comparison", None)
    assert gather(evidence, ["flipped"]) == first
    text = write_table(first, tmp_path / "table.md")
    assert "| 2 | ridge |" in text
    assert "nan" not in text
    gates_plot(first, evidence.learner.model.units, tmp_path / "gates.png")
    again = options(evidence.folder.parent, episodes=3)
    with pytest.raises(ModmetaError, match="other episodes"):
        freeze(evidence.learner, evidence.data, again)
