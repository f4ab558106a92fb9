"""adapt and predict: from images to an adapter file, its card, and predictions."""

import csv
import json
from pathlib import Path

import pytest
from finished_run import Run
from PIL import Image

from modmeta.cli import main


def adapt(run: Run, support: Path, output: str = "a.safetensors", *more: str) -> int:
    words = ["--checkpoint", str(run.checkpoint), "--support", str(support), "--output", output]
    return main(["adapt", *words, *more])


def predict(run: Run, images: Path, *more: str) -> list[dict[str, str]]:
    words = ["--checkpoint", str(run.checkpoint), "--adapter", "a.safetensors", "--images", str(images)]
    assert main(["predict", *words, "--output", "p.csv", *more]) == 0
    with open("p.csv", newline="") as table:
        return list(csv.DictReader(table))


def test_adapt_to_labelled_images_and_predict(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--domain", "neon") == 0
    assert Path("a.safetensors").stat().st_size < 1_000_000
    card = json.loads(Path("a.json").read_text())
    assert card["classes"] == ["0", "1", "2", "3"]
    assert card["provenance"]["images_per_class"] == {"0": 3, "1": 3, "2": 3, "3": 3}
    assert card["labelled"]
    moved = {unit["name"]: unit for unit in card["units"]}
    assert moved["film@all"]["open"]
    assert moved["film@all"]["moved"] > 0
    assert 0 < moved["film@all"]["relative_change"] < 1
    assert len(moved["film@all"]["rates"]) == 3
    page = Path("a.md").read_text()
    assert all(word in page for word in ("film@all", "neon", "sha256:", "torch", "nats per image"))

    rows = predict(tiny_run, tiny_run.flat)
    assert [row["image"] for row in rows] == sorted(path.name for path in tiny_run.flat.iterdir())
    assert {row["class"] for row in rows} <= {"0", "1", "2", "3"}
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    # The model has seen these very images, so it should be right about most.
    assert sum(row["class"] == row["image"][0] for row in rows) > len(rows) / 2


def test_adapt_to_images_without_labels_says_so(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(tiny_run, tiny_run.flat) == 0
    shown = capsys.readouterr().out
    assert "The images have no labels: only units that need none may act (norm_blend@all)" in shown
    card = json.loads(Path("a.json").read_text())
    assert not card["labelled"]
    assert len(card["classes"]) == 10
    assert {unit["name"]: unit["open"] for unit in card["units"]} == {
        "norm_blend@all": True,
        "film@all": False,
    }
    assert len(predict(tiny_run, tiny_run.flat)) == 12


def test_the_same_images_give_the_same_bytes(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support) == 0
    assert adapt(tiny_run, tiny_run.support, "b.safetensors") == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_predictions_are_those_of_any_batch_size_and_abstain(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support) == 0
    whole = predict(tiny_run, tiny_run.support)
    assert whole[0]["image"] == "0/0.png"
    single = predict(tiny_run, tiny_run.support, "--batch-size", "1")
    assert [row["class"] for row in single] == [row["class"] for row in whole]
    unsure = predict(tiny_run, tiny_run.support, "--abstain-below", "1")
    assert {row["abstained"] for row in unsure} == {"true"}


def test_a_budget_of_zero_takes_no_gradient_step(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--budget", "0") == 0
    units = {unit["name"]: unit for unit in json.loads(Path("a.json").read_text())["units"]}
    assert not units["film@all"]["open"]


def test_nothing_is_overwritten_unasked(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.safetensors").write_text("precious")
    assert adapt(tiny_run, Path("no such folder")) == 2
    assert "a.safetensors exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert Path("a.safetensors").read_text() == "precious"
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--overwrite") == 0


def make_support(kind: str) -> Path:
    folder = Path(kind.replace(" ", "_"))
    names = {
        "one class": ["a/0.png"],
        "mixed": ["a/0.png", "b/0.png", "0.png"],
        "empty": [],
        "no image": ["a/0.png"],
    }
    folder.mkdir()
    for name in names[kind]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    if kind == "no image":
        (folder / "b").mkdir()
        (folder / "b/0.png").write_text("text")
    return folder


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("one class", "has one class, 'a'; give two or more"),
        ("mixed", "holds images beside class folders, such as 0.png"),
        ("empty", "holds no image"),
        ("no image", "b/0.png cannot be decoded"),
    ],
)
def test_support_that_cannot_be_used(
    kind: str, expected: str, tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(tiny_run, make_support(kind)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not Path("a.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--checkpoint", "missing.ckpt"], "checkpoint missing.ckpt does not exist"),
        (["--checkpoint", "garbage.ckpt"], "checkpoint garbage.ckpt cannot be read"),
        (["--output", "a.pt"], "should end with .safetensors"),
        (["--output", "nowhere/a.safetensors"], "the folder nowhere does not exist"),
        (["--budget", "2"], "--budget must lie in 0..1"),
        (["--modules", "nope.py"], "the file nope.py does not exist"),
    ],
)
def test_options_that_cannot_be_used(
    words: list[str], expected: str, tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("garbage.ckpt").write_bytes(b"garbage")
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", *words) == 2
    assert expected in capsys.readouterr().err


def test_an_adapter_of_another_training_is_refused(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--config",
        str(tiny_run.config),
        "--seed_everything",
        "1",
        "--model.init_args.backbone.seed",
        "1",
    ]
    assert main(["fit", *words, "--name", "other"]) == 0
    assert adapt(tiny_run, tiny_run.support) == 0
    capsys.readouterr()
    words = ["--adapter", "a.safetensors", "--images", str(tiny_run.flat), "--output", "p.csv"]
    assert main(["predict", "--checkpoint", "runs/other/version_0/checkpoints/last.ckpt", *words]) == 2
    error = capsys.readouterr().err
    assert "a.safetensors is for another backbone: its fingerprint is sha256:" in error
    assert not Path("p.csv").exists()


def test_an_image_that_cannot_be_decoded_stops_predict(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(tiny_run, tiny_run.support) == 0
    Path("broken").mkdir()
    Path("broken/x.png").write_text("text")
    capsys.readouterr()
    words = ["--checkpoint", str(tiny_run.checkpoint), "--adapter", "a.safetensors", "--images", "broken"]
    assert main(["predict", *words, "--output", "p.csv"]) == 2
    assert "broken/x.png cannot be decoded" in capsys.readouterr().err
    assert not Path("p.csv").exists()
