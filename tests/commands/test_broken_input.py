"""What a user gets wrong is answered in one line with the full key and the nearest right one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from modmeta.cli import main

Edit = Callable[[dict], object]


def broken(config: Path, edit: Edit) -> str:
    content = yaml.safe_load(config.read_text())
    edit(content)
    Path("broken.yaml").write_text(yaml.safe_dump(content))
    return "broken.yaml"


def put(key: str, value: object) -> Edit:
    def edit(content: dict) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            content = content[parent]
        content[last] = value

    return edit


def message(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 6
    assert "Traceback" not in error
    found = [line for line in error.splitlines() if line.startswith("modmeta: error: ")]
    assert len(found) == 1
    return found[0]


FILES = [
    (
        "typo, level 1",
        put("trainr", {"max_epochs": 3}),
        "unknown key trainr; did you mean trainer?",
    ),
    ("typo, level 2", put("data.rot", "x"), "unknown key data.rot; did you mean data.root?"),
    (
        "typo, level 3",
        put("model.init_args.headd", "x"),
        "model.init_args.headd; did you mean model.init_args.head?",
    ),
    (
        "typo in a record",
        put("model.init_args.backbone.nam", "x"),
        "unknown key model.init_args.backbone.nam; did you mean model.init_args.backbone.name?",
    ),
    ("typo in a list", put("model.init_args.units", [{"modul": "film"}]), "model.init_args.units.module?"),
    ("wrong type", put("trainer.max_epochs", "many"), "trainer.max_epochs: expected int or null, got many"),
    (
        "wrong type, nested",
        put("model.init_args.source.epochs", "x"),
        "model.init_args.source.epochs: expected int",
    ),
    ("unknown class", put("model.class_path", "ModularMetaLerner"), "did you mean ModularMetaLearner?"),
    ("unknown backbone", put("model.init_args.backbone.name", "resnet19"), "did you mean 'resnet18'?"),
    ("unknown module", put("model.init_args.units", [{"module": "flim"}]), "did you mean 'film'?"),
    ("unknown head", put("model.init_args.head", "rigde"), "did you mean 'ridge'?"),
    (
        "bad interpolation",
        put("model.init_args.backbone.image_size", "${data.image_siz}"),
        "image_size: Interpolation key 'data.image_siz' not found; did you mean data.image_size?",
    ),
    ("broken interpolation", put("data.queries", "${data.seed"), "data.queries: "),
    (
        "missing key",
        lambda c: c["model"]["init_args"]["backbone"].pop("name"),
        "model.init_args.backbone.name is missing",
    ),
    ("missing model", lambda c: c.pop("model"), "the key model is missing"),
    (
        "unknown domain",
        put("data.test_domains", ["neom"]),
        "unknown domain 'neom' in test_domains; did you mean 'neon'?",
    ),
    ("missing root", put("data.root", "/no/such/folder"), "the data folder /no/such/folder does not exist"),
    ("too few images", put("data.queries", 30), "30 queries"),
    ("missing modules file", put("modules", ["nope.py"]), "the file nope.py does not exist"),
    ("wrong trainer option", put("trainer.accelerator", "gpuu"), "accelerator='gpuu'"),
]


@pytest.mark.parametrize(("edit", "expected"), [c[1:] for c in FILES], ids=[c[0] for c in FILES])
def test_broken_configuration(edit: Edit, expected: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in message(capsys, ["fit", "--config", broken(tiny_config, edit)])


OPTIONS = [
    (["--trainer.max_epoch", "3"], "unknown key trainer.max_epoch; did you mean trainer.max_epochs?"),
    (["--model.init_args.source.epoch", "3"], "did you mean model.init_args.source.epochs?"),
    (["--data.queries=x"], "data.queries: expected int, got 'x'"),
    (["--nme", "x"], "unknown key nme; did you mean name?"),
    (["stray"], "unexpected word 'stray'"),
    (["--model", "nowhere.Learner"], "No module named 'nowhere'"),
    (["--ckpt_path", "nope.ckpt"], "checkpoint nope.ckpt does not exist"),
]


@pytest.mark.parametrize(("words", "expected"), OPTIONS, ids=[" ".join(words) for words, _ in OPTIONS])
def test_broken_command_line(
    words: list[str], expected: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in message(capsys, ["fit", "--config", str(tiny_config), *words])


def test_missing_and_invalid_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the file nope.yaml does not exist" in message(capsys, ["fit", "--config", "nope.yaml"])
    Path("invalid.yaml").write_text("data:\n  root: [\n")
    assert "invalid.yaml, line 3 is no valid YAML" in message(capsys, ["fit", "--config", "invalid.yaml"])
    Path("text.yaml").write_text("hello")
    assert "text.yaml holds no keys" in message(capsys, ["fit", "--config", "text.yaml"])


def test_a_users_file_that_cannot_be_imported(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("breaks_on_import.py").write_text("1 / 0\n")
    words = ["fit", "--config", str(tiny_config), "--modules", "breaks_on_import.py"]
    assert "cannot be imported: ZeroDivisionError" in message(capsys, words)
    Path("random.py").write_text("")
    words = ["fit", "--config", str(tiny_config), "--modules", "random.py"]
    assert "has the name of another module (random); rename the file" in message(capsys, words)


def test_a_file_that_is_no_image(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    for domain in ("a", "b"):
        for shade, name in enumerate(("cat", "dog")):
            folder = Path("images", domain, name)
            folder.mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (8, 8), (number, shade, ord(domain))).save(folder / f"{number}.png")
    Path("images/a/cat/0.png").write_text("no image")
    data = {"root": "images", "shots": 1, "eval_shots": [1], "queries": 1, "shift_share": 0.0}
    data |= {"steps_per_epoch": 1, "episodes_per_step": 1, "val_domains": ["b"], "val_episodes": 1, "batch_size": 4}
    edited = broken(tiny_config, put("data", {**data, "strict_images": True}))
    told = "a/cat/0.png, is no image of a known format"
    assert told in message(capsys, ["fit", "--config", edited])
    edited = broken(tiny_config, put("data", data))
    assert main(["fit", "--config", edited, "--name", "on"]) == 0
    assert len([warning for warning in recwarn if told in str(warning.message)]) == 1
    record = json.loads(Path("runs/on/version_0/images.json").read_text())
    assert record["images"] == 19
    assert [refused["image"] for refused in record["quarantined"]] == ["a/cat/0.png"]
    capsys.readouterr()
    measured = ["--config", edited, "--ckpt_path", "runs/on/version_0/checkpoints/last.ckpt"]
    assert main(["validate", *measured, "--name", "on"]) == 0
    assert "left out: 1; images.json names them" in capsys.readouterr().out
    assert main(["fit", "--config", edited, "--name", "half", "--trainer.max_epochs", "1"]) == 0
    measured[-1] = "runs/half/version_0/checkpoints/last.ckpt"
    assert "this model was not trained" in message(capsys, ["validate", *measured])
    for number in range(5):
        Path(f"images/a/cat/{number}.png").write_text("no image")
    assert "images/a/cat holds no good image; the first, a/cat/0.png" in message(capsys, ["fit", "--config", edited])
