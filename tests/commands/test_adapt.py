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


def test_a_budget_is_a_share_of_the_backward_cost(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--budget", "0.5") == 0
    backward = json.loads(Path("a.json").read_text())["backward"]
    assert backward["budget"] == 0.5
    assert backward["share"] + backward["below_budget"] == 0.5
    assert 0 <= backward["share"] <= 0.5
    assert "below the budget" in Path("a.md").read_text()


@pytest.mark.parametrize("labelled", [True, False])
def test_an_explanation_is_shown_and_kept(labelled: bool, tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(tiny_run, tiny_run.support if labelled else tiny_run.flat, "a.safetensors", "--explain") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("what the policy saw", "effective rank", "what each unit did", "a.png"))
    explanation = json.loads(Path("a.json").read_text())["explanation"]
    units = {unit["name"]: unit for unit in explanation["units"]}
    assert units["norm_blend@all"]["effect"]["predictions"] > 0
    assert (units["film@all"]["effect"] is not None) == labelled
    assert (explanation["held_out_loss"] is not None) == labelled
    with Image.open("a.png") as picture:
        assert picture.format == "PNG"
    assert "a.png" in Path("a.md").read_text()
    before = {name: Path(name).read_bytes() for name in ("a.safetensors", "a.json", "a.md", "a.png")}
    Path("a.safetensors").unlink()
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--explain") == 2
    assert "a.md exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert all(Path(name).read_bytes() == before[name] for name in ("a.json", "a.md", "a.png"))


def test_an_explanation_changes_nothing_else(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support) == 0
    assert not Path("a.png").exists()
    assert "explanation" not in json.loads(Path("a.json").read_text())
    assert adapt(tiny_run, tiny_run.support, "b.safetensors", "--explain") == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_a_threshold_of_abstention_travels_in_the_adapter_file(
    tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--abstain-target", "0.8") == 0
    found = json.loads(Path("a.json").read_text())["provenance"]["abstention"]
    assert (found["target"], found["images"]) == (0.8, 12)
    assert found["kept"] == 0 or found["accuracy"] >= 0.8
    assert f"{found['images']} held-out images" in Path("a.md").read_text()
    capsys.readouterr()
    rows = predict(tiny_run, tiny_run.flat, "--abstain-below", "calibrated")
    for row in rows:
        if abs(float(row["probability"]) - found["threshold"]) > 1e-5:  # the table is rounded
            assert (row["abstained"] == "true") == (float(row["probability"]) < found["threshold"])
    assert f"abstained below {found['threshold']:.3f}" in capsys.readouterr().out


def test_thresholds_of_abstention_that_cannot_be_had(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(tiny_run, tiny_run.flat, "a.safetensors", "--abstain-target", "0.9") == 2
    assert "--abstain-target needs labelled images" in capsys.readouterr().err
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--abstain-target", "9") == 2
    assert "--abstain-target must lie in 0..1" in capsys.readouterr().err
    assert not Path("a.safetensors").exists()
    assert adapt(tiny_run, tiny_run.support) == 0
    words = ["--checkpoint", str(tiny_run.checkpoint), "--adapter", "a.safetensors", "--images", str(tiny_run.flat)]
    for given, expected in (
        ("calibrated", "the adapter file holds no threshold; adapt with --abstain-target"),
        ("2", "--abstain-below must lie in 0..1 or be `calibrated`, got 2"),
        ("often", "--abstain-below must lie in 0..1 or be `calibrated`, got often"),
    ):
        assert main(["predict", *words, "--output", "p.csv", "--abstain-below", given]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert len(error.splitlines()) == 1
    assert not Path("p.csv").exists()


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
