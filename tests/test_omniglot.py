"""The Omniglot configurations: all of them fit and test, on alphabets of a few scribbles."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modmeta.cli import main
from modmeta.data import DomainDataModule

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs" / "omniglot").glob("*.yaml"))
ALPHABETS = ("Balinese", "Early_Aramaic", "Greek", "Latin", "Sanskrit", "Tagalog")


@pytest.fixture(scope="module")
def scribbles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six alphabets of three characters with six images."""
    root = tmp_path_factory.mktemp("omniglot")
    random = np.random.default_rng(0)
    for alphabet in ALPHABETS:
        for character in ("character01", "character02", "character03"):
            folder = root / alphabet / character
            folder.mkdir(parents=True)
            for number in range(6):
                Image.fromarray(random.integers(256, size=(28, 28), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_fits_and_tests(
    config: Path, scribbles: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(config), "--data.root", str(scribbles), "--name", "tiny"]
    words += ["--model.init_args.backbone.name", "test_four_block", "--data.ways", "5", "--data.shots", "1"]
    words += ["--data.eval_shots", "[1]", "--data.steps_per_epoch", "1", "--data.episodes_per_step", "2"]
    words += ["--data.val_episodes", "1", "--data.test_episodes", "2", "--data.batch_size", "8"]
    words += ["--trainer.enable_progress_bar", "false"]
    source = int("source:" in config.read_text())
    words += ["--model.init_args.source.epochs", str(source), "--trainer.max_epochs", str(source + 1)]
    assert main(words) == 0
    records = json.loads((tmp_path / "runs/tiny/version_0/results.json").read_text())
    accuracy = [r for r in records if r["system"] == "adapted" and r["metric"] == "accuracy"]
    assert [(r["domain"], r["shots"], r["ways"], r["episodes"]) for r in accuracy] == [("mixed", 1, 5, 2)]


def test_held_out_alphabets_stay_held_out(scribbles: Path) -> None:
    data = DomainDataModule(
        root=str(scribbles), own_classes=True, rotations=True, mix_domains=True, val_domains=["Greek"],
        test_domains=["Balinese", "Tagalog"], image_size=28, ways=12, eval_ways=8, shots=1, eval_shots=[1], queries=2,
    )  # fmt: skip
    data.setup()
    drawn = {
        split: {name.split("/")[0] for index in range(20) for name in data.episode(split, index).classes}
        for split in ("train", "val", "test")
    }
    assert drawn == {
        "train": {"Early_Aramaic", "Latin", "Sanskrit"}, "val": {"Greek"}, "test": {"Balinese", "Tagalog"},
    }  # fmt: skip
    assert len(data.episode("train", 0).classes) == 12
    assert len(data.episode("test", 0).classes) == 8
    assert (data.val_domains, data.test_domains) == (("mixed",), ("mixed",))
