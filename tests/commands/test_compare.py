"""compare: from a finished run to a report, again and again."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from finished_run import Run

from modmeta.cli import main

SYSTEMS = {
    "anchored_ridge": {"system": "head"},  # the learner's own, with the strengths that it has learned
    "ridge": {"system": "head", "head": "ridge"},
    "policy": {"system": "learner"},
}
OUTPUT = Path("runs/compare/compare")
FILES = ("report.md", "results.json", "rows.csv")


def write(run: Run, **changes: object) -> list[str]:
    content = {
        "checkpoints": {"neon": str(run.checkpoint)},
        "data": {"root": "digits", "ways": 4, "shots": [1, 3], "queries": 2, "cache_dir": "cache"},
        "systems": SYSTEMS, "shots": [1, 3], "episodes": 2, "oracles": {"oracle": ["ridge", "policy"]},
    }  # fmt: skip
    Path("compare.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return ["compare", "--config", "compare.yaml"]


def message(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("modmeta: error: ")
    return line


def results(folder: Path = OUTPUT) -> list[dict]:
    records = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    return [record for record in records if record["metric"] != "seconds"]


def test_a_comparison_from_end_to_end(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = write(tiny_run)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "5 shots, mean over domains" not in shown
    assert "3 shots, mean over domains" in shown
    assert "report: runs/compare/compare/report.md" in shown
    found = {(r["system"], r["domain"], r["shots"], r["metric"]): r for r in results()}
    for system in (*SYSTEMS, "oracle"):
        assert {d for s, d, _, _ in found if s == system} == {"neon", "mean"}
        assert found[system, "neon", 3, "accuracy"]["episodes"] == 2
    # The very episodes that `test` measured, and the figures that it found.
    tested = json.loads((tiny_run.folder / "results.json").read_text())
    for record in tested:
        name = {"none": "anchored_ridge", "adapted": "policy"}.get(record["system"])
        if name and record["metric"] in ("accuracy", "nll", "ece"):
            mine = found[name, "neon", record["shots"], record["metric"]]
            assert mine["value"] == pytest.approx(record["value"], rel=1e-4)
    assert (tiny_run.folder / "results.json").exists()
    with (OUTPUT / "rows.csv").open(newline="") as table:
        assert len(list(csv.DictReader(table))) == 3 * 2 * 2
    assert any(Path("cache").iterdir())

    before = {name: (OUTPUT / name).read_bytes() for name in FILES}
    measured = (OUTPUT / "rows.jsonl").read_bytes()
    for again in (words, [*words, "--report-only"], ["compare", "--config", str(OUTPUT / "config.yaml")]):
        assert main(again) == 0
        assert {name: (OUTPUT / name).read_bytes() for name in FILES} == before
        assert (OUTPUT / "rows.jsonl").read_bytes() == measured


def test_systems_and_episodes_are_added_and_other_changes_refused(
    tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write(tiny_run, oracles={})
    assert main([*words, "--episodes", "1", "--shots", "[1]"]) == 0
    more = [*words, "--shots", "[1]", "--systems.prototype.system", "head", "--systems.prototype.head", "prototype"]
    assert main(more) == 0
    assert main([*more, "--output", "whole"]) == 0
    assert results() == results(Path("whole"))
    assert "episodes is not what" in message([*more, "--episodes", "1"], capsys)
    assert "systems.prototype is not what" in message([*words, "--shots", "[1]"], capsys)
    assert "systems.ridge.head is not what" in message([*more, "--systems.ridge.head", "cosine"], capsys)
    assert "flipped_labels is not what" in message([*more, "--flipped_labels", "0.5"], capsys)
    other = tiny_run.folder / "checkpoints" / "other.ckpt"
    other.write_bytes(tiny_run.checkpoint.read_bytes() + b"\0")
    moved = [*more, "--checkpoints", f"{{neon: {other}}}"]
    assert "is not the file that the rows of domain 'neon'" in message(moved, capsys)
    other.unlink()


def test_a_manifest_serves_another_comparison(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = write(tiny_run, systems={"anchored_ridge": SYSTEMS["anchored_ridge"]}, oracles={}, episodes=1)
    assert main([*words, "--output", "one", "--seed", "1"]) == 0
    assert main([*words, "--output", "two", "--seed", "2", "--manifest", "one/episodes.json"]) == 0
    assert Path("one/episodes.json").read_bytes() == Path("two/episodes.json").read_bytes()
    values = [[r["value"] for r in results(Path(name))] for name in ("one", "two")]
    assert values[0] == values[1]
    assert main([*words, "--output", "three", "--seed", "2"]) == 0
    assert Path("three/episodes.json").read_bytes() != Path("two/episodes.json").read_bytes()
    wanting = [*words, "--output", "four", "--episodes", "2", "--manifest", "one/episodes.json"]
    assert "the manifest has no episode 1 of domain 'neon'" in message(wanting, capsys)
    mixed = [*words, "--output", "three", "--seed", "2", "--manifest", "one/episodes.json"]
    assert "three/episodes.json holds other episodes" in message(mixed, capsys)


WRONG = [
    (["--episods", "3"], "unknown key episods; did you mean episodes?"),
    (["--data.rot", "x"], "unknown key data.rot; did you mean data.root?"),
    (["--systems.ridge.hed", "x"], "unknown key systems.ridge.hed; did you mean systems.ridge.head?"),
    (["--systems.ridge.system", "heads"], "unknown system 'heads' in systems.ridge; did you mean 'head'?"),
    (["--reference", "rigde"], "unknown system 'rigde' in reference; did you mean 'ridge'?"),
    (["--episodes", "many"], "episodes: expected int"),
    (["--flipped_labels", "2"], "flipped_labels=2.0 must lie in 0..1"),
    (["--accelerator", "tpu"], "accelerator: expected one of 'cpu', 'cuda'"),
    (["--report-only"], "holds no episode that all systems were measured on"),
    (["--config", "nope.yaml"], "the file nope.yaml does not exist"),
]


@pytest.mark.parametrize(("words", "expected"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_words_are_refused_before_data_is_read(
    words: list[str], expected: str, tiny_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("modmeta.commands.compare._data", lambda comparison: pytest.fail("data was read"))
    assert expected in message([*write(tiny_run), *words], capsys)
    assert not OUTPUT.exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"systems": {"ridge": {"head": "ridge"}}}, "systems.ridge: the key system is missing"),
        ({"systems": ["ridge"]}, "systems: compare.yaml should map names to systems"),
        ({"systems": {"a b": {"system": "head"}}}, "systems: 'a b' is no name"),
        (
            {"systems": SYSTEMS | {"tuned": {"system": "fine_tune", "units": [], "prior_share": 1.5}}},
            "systems.tuned: prior_share must lie in 0..1, got 1.5",
        ),
        ({"systems": {}}, "systems: there is nothing to compare"),
        ({"sytems": {"a": {"system": "head"}}}, "unknown key sytems; did you mean systems?"),
        ({"checkpoints": {"neon": "nope.ckpt"}}, "checkpoint nope.ckpt"),
        ({"checkpoints": {"nein": "nope.ckpt"}}, "nope.ckpt"),
    ],
)
def test_configurations_that_cannot_be(
    changes: dict, expected: str, tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in message(write(tiny_run, **changes), capsys)
    assert not OUTPUT.exists()


def test_data_and_checkpoint_must_fit(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(tiny_run.checkpoint)
    assert "was trained on domain 'ink'" in message(write(tiny_run, checkpoints={"ink": checkpoint}), capsys)
    unknown = write(tiny_run, checkpoints={"nein": checkpoint}, output="b")
    assert "unknown domain 'nein' in test_domains; did you mean 'neon'?" in message(unknown, capsys)
    larger = [*write(tiny_run, output="c"), "--data.image_size", "64"]
    assert "is for images of 32 pixels; set data.image_size to that" in message(larger, capsys)


def test_the_example_is_accepted(tiny_run: Run) -> None:
    example = Path(__file__).parents[2] / "configs" / "compare" / "quickstart.yaml"
    small = ["--checkpoints", f"{{neon: {tiny_run.checkpoint}}}", "--episodes", "1", "--shots", "[2]"]
    assert main(["compare", "--config", str(example), *small, "--output", "out"]) == 0
    page = Path("out/report.md").read_text()
    assert all(f"| {name} |" in page for name in ("source", "policy", "oracle †", "policy - statistics"))
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
