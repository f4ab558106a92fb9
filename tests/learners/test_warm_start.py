"""The value model and the warm start, on tables whose best action is known by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from modmeta.errors import ModmetaError
from modmeta.learners import ModularMetaLearner
from modmeta.learners.action_table import (
    Action,
    describe,
    indicator_columns,
    part_file,
    read_table,
    write_part,
)
from modmeta.learners.value_model import action_features, changes, contexts, fit_value_model
from modmeta.learners.warm_start import start_from_table, table_for

SIGNAL = "difficulty/held-out loss"
EPISODES = 60


def learner(**changes: Any) -> ModularMetaLearner:
    return tiny.modular(indicators=["task", "difficulty", "place"], **changes)


def header_of(learner: ModularMetaLearner, actions: list[Action]) -> dict[str, Any]:
    header = describe(learner.model.units, learner.indicators, learner.policy.steps)
    rows = [{"name": a.name, "gates": list(a.gates), "rates": list(a.rates), "ridge": a.ridge} for a in actions]
    return {**header, "actions": rows}


def actions_of(learner: ModularMetaLearner) -> list[Action]:
    """Nothing; the statistics half open; or every learning unit at twice its rate with a strong ridge."""
    units, closed = learner.model.units, (0.0,) * len(learner.model.units)
    reads = tuple(0.5 * (unit.reads and not unit.learns) for unit in units)
    learns = tuple(float(unit.learns) for unit in units)
    rates = tuple(2 * unit.rate * unit.learns for unit in units)
    return [Action("none", closed, closed, 1.0), Action("read", reads, closed, 1.0), Action("move", learns, rates, 3.0)]


def places(header: dict[str, Any]) -> dict[str, float]:
    """What tells the units apart, the same in all episodes: how deep each is, whether it learns, whether it reads."""
    numbers = [number.removeprefix("place/") for number in header["indicators"]["unit"]]
    return {f"{u['name']}/place/{number}": float(u.get(number, 0.0)) for u in header["units"] for number in numbers}


def rows_of(header: dict[str, Any], episode: int, signal: float, **changed: Any) -> list[dict[str, Any]]:
    """A signal above 0 makes `read` good and `move` bad, one below 0 the other way round."""
    generator = torch.Generator().manual_seed(episode)
    seen = dict(zip(indicator_columns(header), torch.randn(1000, generator=generator).tolist(), strict=False))
    effects = {"none": 0.0, "read": -0.2 * signal, "move": 0.2 * signal}
    rows = []
    for action in header["actions"]:
        loss = 1.0 + effects[action["name"]]
        facts = {
            "episode": episode, "domain": "abc"[episode % 3], "shots": 1 + episode % 2, "ways": 3, "shift": "",
            "strength": 0.0, "action": action["name"], "gates": action["gates"], "rates": action["rates"],
            "ridge": action["ridge"], "nll": loss, "tempered_nll": loss, "accuracy": 0.5,
            "half_nll": [loss, loss], "half_tempered_nll": [loss, loss], "half_accuracy": [0.5, 0.5],
            "backward_macs": 0,
        }  # fmt: skip
        rows.append(facts | seen | {SIGNAL: signal} | places(header) | changed)
    return rows


def write(folder: Path, learner: ModularMetaLearner) -> dict[str, Any]:
    header = header_of(learner, actions_of(learner))
    signals = torch.linspace(-1, 1, EPISODES)[torch.randperm(EPISODES, generator=torch.Generator().manual_seed(0))]
    rows = [row for index, signal in enumerate(signals.tolist()) for row in rows_of(header, index, signal)]
    half = len(rows) // 2
    write_part(part_file(folder, 0), rows[:half], header)
    write_part(part_file(folder, 1), rows[half:], header)
    return header


def decide(learner: ModularMetaLearner, signal: float) -> Any:
    """The plan for an average domain of a given signal, without noise."""
    indicators = learner.indicators
    whole = torch.zeros(indicators.global_width)
    at = ["/".join(number) for number in indicators.numbers(per_unit=False)].index(SIGNAL)
    whole[at] = (signal - indicators.center_global[at]) / indicators.scale_global[at]
    raw = torch.tensor(list(places(header_of(learner, [])).values())).view(len(learner.model.units), -1)
    each = ((raw - indicators.center_unit) / indicators.scale_unit).clamp(-3, 3)
    with torch.no_grad():
        return learner.policy.eval()(learner.model.units, whole, each)


def started(folder: Path, seed: int = 0) -> ModularMetaLearner:
    made = learner()
    torch.manual_seed(seed)
    for parameter in made.policy.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    table = table_for(folder, made.policy, made.indicators, made.model.units)
    before = torch.get_rng_state()
    start_from_table(table, made.policy, made.indicators, made.model.units)
    assert torch.equal(torch.get_rng_state(), before)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("table")
    write(made, learner())
    return made


@pytest.fixture(scope="module")
def warm(folder: Path) -> ModularMetaLearner:
    return started(folder)


def test_a_table_is_read_as_it_was_written(folder: Path) -> None:
    made, table = learner(), read_table(folder)
    assert table.episodes == tuple(range(EPISODES))
    assert table.actions == tuple(actions_of(made))
    assert (table.domains[4], int(table.shots[5]), table.idle) == ("b", 2, 0)
    at = table.header["indicators"]["global"].index(SIGNAL)
    torch.testing.assert_close(changes(table)[:, 1].float(), -0.2 * table.whole[:, at])
    drawn = torch.randn(1000, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(table.whole[7, :at], drawn[:at])
    depth = table.header["indicators"]["unit"].index("place/depth")
    torch.testing.assert_close(table.each[7, :, depth], torch.tensor([unit.depth for unit in made.model.units]))


def test_the_value_model_is_the_ridge_regression_that_it_says(folder: Path) -> None:
    table = read_table(folder)
    model = fit_value_model(table)
    torch.testing.assert_close(model.changes(table)[:, 0], torch.zeros(EPISODES, dtype=torch.double))
    # Normal equations of the same problem, written out: every pair of context and feature is one regressor.
    z = model._standard(contexts(table))
    regressors = torch.einsum("ec,ap->eacp", z, action_features(table)).flatten(2).flatten(0, 1)
    penalty = model.strength * regressors.shape[0] * torch.eye(regressors.shape[1], dtype=torch.double)
    weight = torch.linalg.solve(regressors.T @ regressors + penalty, regressors.T @ changes(table).flatten())
    torch.testing.assert_close((regressors @ weight).view(EPISODES, 3), model.changes(table), atol=1e-6, rtol=1e-5)


def test_the_value_model_foresees_episodes_that_it_was_not_fitted_to(folder: Path) -> None:
    table = read_table(folder)
    out = torch.tensor([domain == "c" for domain in table.domains])
    guess = fit_value_model(table, (~out).nonzero().flatten()).changes(table)[out]
    true = changes(table)[out]
    assert float((guess - true).square().mean()) < 0.05 * float(true.square().mean())


def test_the_policy_follows_the_indicator_that_tells_the_best_action(warm: ModularMetaLearner) -> None:
    units = warm.model.units
    reads = torch.tensor([unit.reads and not unit.learns for unit in units])
    learns = torch.tensor([unit.learns for unit in units])
    high, low = decide(warm, 0.8), decide(warm, -0.8)
    assert (high.gates[reads] > 0.35).all()
    assert (high.gates[learns] < 0.15).all()
    assert (low.gates[reads] < 0.15).all()
    assert (low.gates[learns] > 0.85).all()
    configured = torch.tensor([unit.rate for unit in units])
    torch.testing.assert_close(low.rates[learns].mean(1), 2 * configured[learns], rtol=0.25, atol=0)
    assert float(low.ridge) > 2.0
    assert 0.7 < float(high.ridge) < 1.4
    # At 0.8 either choice gains 0.16 nats.
    assert float(high.gain) == pytest.approx(0.16, abs=0.06)
    assert float(low.gain) == pytest.approx(0.16, abs=0.06)


def test_the_start_is_a_function_of_the_table_alone(folder: Path, warm: ModularMetaLearner) -> None:
    other = started(folder, seed=2)
    for (name, mine), theirs in zip(warm.policy.state_dict().items(), other.policy.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(warm.indicators.buffers(), other.indicators.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_fit_starts_from_the_table(folder: Path, warm: ModularMetaLearner, tmp_path: Path) -> None:
    fitted = learner(warm_start=str(folder), learning_rate=1e-9)
    tiny.trainer(tmp_path, 1).fit(fitted, datamodule=tiny.digits())
    for (name, mine), wanted in zip(fitted.policy.state_dict().items(), warm.policy.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=0, msg=name)
    assert torch.equal(fitted.indicators.center_global, warm.indicators.center_global)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": tiny.UNITS[:2]}, "other units: it has .*projection.*log one with this configuration"),
        ({"indicators": ["task", "place"]}, "other indicators"),
        ({"steps": 3}, "other steps: it has 2, this learner 3"),
    ],
)
def test_a_foreign_table_is_refused_before_any_work(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    options = {"indicators": ["task", "difficulty", "place"], "warm_start": str(folder)} | changes
    made = tiny.modular(source=tiny.source(), **options)
    with pytest.raises(ModmetaError, match=message) as caught:
        tiny.trainer(tmp_path, 1).fit(made, datamodule=tiny.digits())
    assert "\n" not in str(caught.value)
    assert not made.sources.ready


def test_a_broken_table_is_refused(tmp_path: Path) -> None:
    made = learner()
    with pytest.raises(ModmetaError, match="holds no action table"):
        read_table(tmp_path)
    header = write(tmp_path, made)
    last = part_file(tmp_path, 1)
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModmetaError, match=r"part-00001.parquet is no part of an action table"):
        read_table(tmp_path)
    damaged = bytearray(whole)
    damaged[4:400] = bytes(396)
    last.write_bytes(bytes(damaged))
    with pytest.raises(ModmetaError, match="malformed"):
        read_table(tmp_path)
    write_part(last, rows_of(header, 0, 0.5), header)
    with pytest.raises(ModmetaError, match="an episode is there twice"):
        read_table(tmp_path)
    write_part(last, rows_of(header, 99, 0.5)[:2], header)
    with pytest.raises(ModmetaError, match="rows for 3 actions"):
        read_table(tmp_path)
    write_part(last, rows_of(header, 99, 0.5), header | {"steps": 9})
    with pytest.raises(ModmetaError, match="of another table than part-00000"):
        read_table(tmp_path)


def test_no_number_that_is_not_finite_is_written(tmp_path: Path) -> None:
    header = header_of(made := learner(), actions_of(made))
    for name, value in {"nll": float("nan"), "half_nll": [0.0, float("inf")], SIGNAL: float("nan")}.items():
        with pytest.raises(ValueError, match="episode 0, action 'none': a number is not finite"):
            write_part(part_file(tmp_path, 0), rows_of(header, 0, 0.5, **{name: value}), header)
    assert not list(tmp_path.iterdir())
