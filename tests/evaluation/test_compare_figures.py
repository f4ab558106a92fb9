"""Figures of made-up rows against plain arithmetic; nothing is ever not a number."""

import dataclasses
import json
import math
from pathlib import Path
from statistics import mean

import compared
import pytest

from modmeta.errors import ModmetaError
from modmeta.evaluation.compare import Comparison, Row, write_report
from modmeta.evaluation.compare.figures import complete_rows, compute_results
from modmeta.evaluation.compare.hindsight import best_constants, hindsight_rows
from modmeta.learners import Result
from modmeta.learners.metrics import share_interval

THREE = {name: {"system": "head"} for name in ("anchored_ridge", "b", "c")}
Found = dict[tuple[str, str, int, str], Result]


def compute(rows: list[Row], comparison: Comparison) -> Found:
    results = compute_results(complete_rows(rows, comparison), comparison)
    return {(r.system, r.domain, r.shots, r.metric): r for r in results}


def values(rows: list[Row], system: str, domain: str, shots: int, metric: str) -> list[float]:
    return [getattr(r, metric) for r in rows if (r.system, r.domain, r.shots) == (system, domain, shots)]


def test_figures_are_plain_means_and_paired_differences() -> None:
    comparison = compared.settings(episodes=7)
    rows = compared.rows(comparison)
    found = compute(rows, comparison)
    for domain in comparison.domains:
        for metric in ("accuracy", "nll", "seconds"):
            result = found["other", domain, 2, metric]
            assert result.value == pytest.approx(mean(values(rows, "other", domain, 2, metric)))
            assert (result.episodes, result.ways) == (7, 3)
            assert result.low < result.value < result.high
        pairs = zip(*(values(rows, name, domain, 2, "accuracy") for name in ("other", "anchored_ridge")), strict=True)
        gains = [other - reference for other, reference in pairs]
        assert found["other", domain, 2, "gain"].value == pytest.approx(mean(gains))
        assert found["other", domain, 2, "harm_rate"].value == pytest.approx(mean(gain < -0.01 for gain in gains))
        pair = found["other - anchored_ridge", domain, 2, "accuracy_difference"]
        assert (pair.value, pair.low, pair.high) == pytest.approx(
            [getattr(found["other", domain, 2, "gain"], each) for each in ("value", "low", "high")]
        )
        # One bin of 100 predictions with a mean confidence of 0.64.
        hits = mean(values(rows, "other", domain, 2, "accuracy"))
        assert found["other", domain, 2, "ece"].value == pytest.approx(abs(0.64 - hits))
    for metric in ("accuracy", "gain", "ece", "harm_rate"):
        over = found["other", "mean", 2, metric]
        both = [found["other", domain, 2, metric].value for domain in comparison.domains]
        assert over.value == pytest.approx(mean(both))
        assert over.episodes == 14
    harm = found["other", "mean", 2, "harm_rate"]
    assert (harm.value, harm.low, harm.high) == share_interval(harm.value, 14)
    assert ("anchored_ridge", "mean", 1, "gain") not in found
    worst = [r for r in found.values() if r.metric == "worst_gain" and r.shots == 2]
    assert [(r.system, r.value) for r in worst] == [
        ("other", min(found["other", d, 2, "gain"].value for d in comparison.domains))
    ]


def test_domains_are_resampled_on_their_own() -> None:
    comparison = compared.settings(episodes=40)
    # Each domain is constant: whoever mixed the domains' episodes would see a spread.
    rows = [
        dataclasses.replace(row, accuracy=0.9 if row.domain == "neon" else 0.3) for row in compared.rows(comparison)
    ]
    result = compute(rows, comparison)["other", "mean", 1, "accuracy"]
    assert (result.value, result.low, result.high) == pytest.approx((0.6, 0.6, 0.6))


def test_figures_do_not_depend_on_the_order_of_rows_or_on_other_systems() -> None:
    comparison = compared.settings(episodes=5)
    rows = compared.rows(comparison)
    found = compute(rows, comparison)
    assert compute(rows[::-1], comparison) == found
    more = compared.settings(episodes=5, systems={**comparison.systems, "new": {"system": "head"}})
    extended = compute(rows + [dataclasses.replace(r, system="new") for r in rows if r.system == "other"], more)
    assert {key: r for key, r in extended.items() if "new" not in key[0]} == found
    assert extended["new", "mean", 1, "gain"] == dataclasses.replace(found["other", "mean", 1, "gain"], system="new")


def test_an_oracle_takes_the_best_per_episode_and_a_best_constant_per_shots() -> None:
    members = ["b", "c"]
    comparison = compared.settings(systems=THREE, episodes=4, oracles={"o": members}, best_constant={"k": members})
    rows = compared.rows(comparison)
    found = hindsight_rows(rows, comparison)
    by_key = {row.key: row for row in rows}
    for row in found:
        losses = {name: by_key[name, *row.key[1:]].nll for name in members}
        if row.system == "o":
            assert row.nll == min(losses.values())
            chosen = min(losses, key=losses.__getitem__)
        else:
            totals = {n: sum(r.nll for r in rows if (r.system, r.shots) == (n, row.shots)) for n in members}
            chosen = min(totals, key=totals.__getitem__)
            assert best_constants(rows, members)[row.shots] == chosen
        assert row == dataclasses.replace(by_key[chosen, *row.key[1:]], system=row.system)
    assert len(found) == 2 * len(rows) // 3


def test_shares_of_the_gap() -> None:
    comparison = compared.settings(systems=THREE, episodes=2, shots=[1], oracles={"o": ["anchored_ridge", "b"]})
    rows = []
    for domain in comparison.domains:
        for draw in range(2):
            # Each of the two is right in every second domain, the third is half-way to the oracle.
            good = (domain == "neon") == (draw >= 0)
            for name, accuracy, nll in (
                ("anchored_ridge", 0.9 if good else 0.4, 0.2 if good else 1.2),
                ("b", 0.5 if good else 0.9, 1.0 if good else 0.2),
                ("c", 0.8, 0.4),
            ):
                rows.append(compared.row(name, domain, 1, draw, accuracy=accuracy, nll=nll))
    found = compute(rows, comparison)
    # By loss the best constant is b with 0.6 and 0.7; the oracle has 0.2 and 0.9.
    assert found["b", "mean", 1, "nll_gap_closed/o"].value == 0
    assert found["c", "mean", 1, "nll_gap_closed/o"].value == pytest.approx(0.5)
    assert found["c", "mean", 1, "accuracy_gap_closed/o"].value == pytest.approx(0.5)
    assert found["anchored_ridge", "mean", 1, "nll_gap_closed/o"].value == pytest.approx(-0.25)


@pytest.mark.fault(37)
def test_where_an_oracle_has_no_gap_no_share_is_told() -> None:
    comparison = compared.settings(episodes=2, shots=[1], oracles={"o": ["other"]})
    found = compute(compared.rows(comparison), comparison)
    assert not [key for key in found if "gap_closed" in key[3]]


@pytest.mark.parametrize("episodes", [1, 2])
def test_every_file_of_a_report_is_finite(episodes: int, tmp_path: Path) -> None:
    names = list(THREE)
    comparison = compared.settings(
        systems=THREE, episodes=episodes, differences=[("b", "c"), ("o", "k")], oracles={"o": names},
        best_constant={"k": names[1:]},
    )  # fmt: skip
    write_report(comparison, compared.rows(comparison), tmp_path)
    records = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert all(math.isfinite(r[k]) for r in records for k in ("value", "low", "high"))
    assert all(r["low"] <= r["value"] <= r["high"] for r in records)
    page = (tmp_path / "report.md").read_text()
    assert "nan" not in page.lower().replace("finance", "")
    assert "| b - c |" in page
    assert "| o † |" in page
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 3 * 2 * 2 * episodes
    for plot in ("accuracy", "cost", "domains"):
        assert (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_says_how_many_episodes_of_each_domain_are_harmed(tmp_path: Path) -> None:
    comparison = compared.settings(episodes=4, shots=[1])
    rows = [
        compared.row(name, domain, 1, draw, accuracy=0.7 if name == "other" and domain == "paper" and draw < 3 else 0.8)
        for name in comparison.systems
        for domain in comparison.domains
        for draw in range(4)
    ]
    write_report(comparison, rows, tmp_path)
    after = (tmp_path / "report.md").read_text().split("Episodes harmed, %:")[1].split("Paired differences")[0]
    assert [line.split(" [")[0] for line in after.splitlines() if line.startswith("| other")] == ["| other | 0.0"]
    assert "| 75.0 [" in after
    assert "| 37.5 [" in after
    assert "| anchored_ridge" not in after


def test_one_system_alone_can_be_reported(tmp_path: Path) -> None:
    comparison = compared.settings(systems={"anchored_ridge": {"system": "head"}})
    write_report(comparison, compared.rows(comparison), tmp_path)
    assert (tmp_path / "report.md").exists()


def test_an_unfinished_comparison_says_so_and_stays_paired(tmp_path: Path) -> None:
    comparison = compared.settings(episodes=3)
    rows = compared.rows(comparison)
    part = [row for row in rows if row.key != ("other", "paper", 2, 2)]
    write_report(comparison, part, tmp_path)
    assert "**Unfinished: 11 of 12 episodes.**" in (tmp_path / "report.md").read_text()
    assert compute(part, comparison)["anchored_ridge", "paper", 2, "accuracy"].episodes == 2
    with pytest.raises(ModmetaError, match="no episode that all systems were measured on"):
        write_report(comparison, [row for row in rows if row.system == "other"], tmp_path)
