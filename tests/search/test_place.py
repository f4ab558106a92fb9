import json
from pathlib import Path

import pytest
import torch
import yaml

from modmeta.adapters.units import resolve_units
from modmeta.cli import main
from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError
from modmeta.learners import load_learner
from modmeta.search.evolution import Evolution
from modmeta.search.placement import PlacementSearch, affordable, chosen_units


def place(checkpoint: Path, output: str, **settings: object) -> int:
    Path("search.yaml").write_text(yaml.safe_dump({"population": 4, "generations": 2, "parents": 3} | settings))
    return main(["place", "--checkpoint", str(checkpoint), "--config", "search.yaml", "--output", output])


def test_a_search_ends_with_units_that_fit_takes(
    checkpoint: Path, supernet_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place(checkpoint, "units.yaml") == 0
    assert "8 placements measured, 0 diverged" in capsys.readouterr().out
    record = json.loads(Path("units.search.json").read_text())
    rows = [row for generation in record["generations"] for row in generation]
    best = max(rows, key=lambda row: row["gain"])
    # A policy decides about these units then, on top of the rest of the supernet's configuration.
    words = ["--config", str(supernet_config), "--config", "units.yaml", "--model.class_path", "ModularMetaLearner"]
    words += ["--model.init_args.veto_trials", "0", "--model.init_args.calibration_episodes", "2"]
    assert main(["fit", *words, "--trainer.fast_dev_run", "true"]) == 0
    capsys.readouterr()
    assert main(["fit", *words, "--print_config"]) == 0
    units = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["units"]
    assert {unit["module"] for unit in units} == {name.partition("@")[0] for name in best["open"]}


def test_a_search_that_goes_on_is_the_same(checkpoint: Path) -> None:
    assert place(checkpoint, "whole.yaml", generations=3) == 0
    assert place(checkpoint, "parts.yaml", generations=1) == 0
    first = json.loads(Path("parts.search.json").read_text())
    assert [len(generation) for generation in first["generations"]] == [4]
    assert place(checkpoint, "parts.yaml", generations=3) == 0
    assert Path("parts.search.json").read_bytes() == Path("whole.search.json").read_bytes()
    assert Path("parts.yaml").read_text() == Path("whole.yaml").read_text().replace("whole.yaml", "parts.yaml")


def test_a_record_of_another_search_is_left_alone(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert place(checkpoint, "units.yaml", generations=1) == 0
    before = Path("units.search.json").read_bytes()
    for change, key in ({"seed": 1}, "seed"), ({"data": {"ways": 4}}, "data"):
        assert place(checkpoint, "units.yaml", **change) == 2
        assert f"is of a search with another {key}" in capsys.readouterr().err
    assert Path("units.search.json").read_bytes() == before
    Path("mine.yaml").write_text("precious")
    assert place(checkpoint, "mine.yaml") == 2
    assert "mine.yaml exists and is of no search" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "precious"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"populaton": 3}, "did you mean population?"),
        ({"data": {"val_episode": 3}}, "did you mean data.val_episodes?"),
        ({"population": 0}, "population=0 is too small"),
        ({"budget": 2.0}, "budget must lie in 0..1"),
        ({"data": {"image_size": 64}}, "is for images of 32 pixels"),
    ],
)
def test_settings_that_are_not_accepted(
    checkpoint: Path, settings: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place(checkpoint, "units.yaml", **settings) == 2
    assert message in capsys.readouterr().err
    assert not Path("units.yaml").exists()


def test_the_gain_is_that_of_the_learner(checkpoint: Path) -> None:
    """The mean of the losses by hand, along the path of a unit that the search never treats in a special way."""
    assert place(checkpoint, "units.yaml") == 0
    learner = load_learner(checkpoint)
    record = json.loads(Path("units.search.json").read_text())
    row = record["generations"][0][0]
    data = DomainDataModule(**record["settings"]["data"])
    data.setup("fit")
    gains = []
    for index in range(2):
        task = data.episode("val", index)
        with torch.no_grad():
            before, after = (learner.path_logits(names, task).double().log_softmax(-1) for names in ((), row["open"]))
        picked = torch.arange(len(task.query_labels)), task.query_labels
        gains.append(float((after[picked] - before[picked]).mean()))
    assert row["gain"] == pytest.approx(sum(gains) / 2, abs=1e-5)


def test_a_budget_leaves_dear_units_out(checkpoint: Path) -> None:
    learner = load_learner(checkpoint)
    cheap = affordable(learner, 0.2)
    names = {name for sets in cheap.choices for choice in sets for name in choice}
    assert "projection@features" in names
    assert names < {unit.name for unit in learner.model.units}
    learner.placements = learner.placements.within(["film@s3", "bias@s3"])
    with pytest.raises(ModmetaError, match=r"budget=0\.0 has no room"):
        PlacementSearch(learner, [], Evolution(), 0.0, Path("none.json"), {})


def test_chosen_units_are_the_units_themselves(checkpoint: Path) -> None:
    learner = load_learner(checkpoint)
    for names in (["film@s3"], ["film@s4", "bias@s3", "projection@features"], [u.name for u in learner.model.units]):
        configs = chosen_units(learner, names)
        found = {unit.name: unit.sites for unit in resolve_units(learner.model.backbone, configs)}
        assert found == {unit.name: unit.sites for unit in learner.model.units if unit.name in names}
