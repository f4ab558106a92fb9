"""A fit goes on from a checkpoint only as the fit that wrote it: same configuration, same data, same backbone."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_run import Run
from PIL import Image
from safetensors.torch import save_file

from modmeta.backbone import Backbone
from modmeta.cli import main
from modmeta.commands.same_run import describe_data, refuse_other_data
from modmeta.data import DomainDataModule, DomainFolder
from modmeta.errors import ModmetaError
from modmeta.learners import AtomicCheckpointIO, read_checkpoint

FOLDER = Path("runs/tiny/version_0")
LAST = FOLDER / "checkpoints/last.ckpt"
INIT = "--model.init_args"


@pytest.fixture(autouse=True)
def _a_run_of_two_epochs(tiny_run: Run) -> None:
    shutil.copytree(tiny_run.folder, FOLDER)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["fit", *words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("modmeta: error: ")]
    return line


CHANGES = [
    ([f"{INIT}.learning_rate", "0.01"], "model.init_args.learning_rate: was 0.001, is 0.01;"),
    (["--data.ways", "3"], "data.ways: was 4, is 3;"),
    (["--data.seed", "1"], "data.seed: was 0, is 1;"),
    (["--seed_everything", "7"], "seed_everything: was 0, is 7;"),
    (["--data.val_domains", "[ink]"], "data.val_domains: was ['slanted'], is ['ink'];"),
    ([f"{INIT}.backbone.name", "test_resnet"], "backbone.name: was test_efficientnet, is test_resnet;"),
    ([f"{INIT}.head_options", "{scale: 5}"], "model.init_args.head_options.scale: was absent, is 5.0"),
    (["--trainer.gradient_clip_val", "1"], "trainer.gradient_clip_val: was null, is 1"),
    (
        [f"{INIT}.units", "[{module: norm_blend, group: all}, {module: film, group: all, rate: 0.5}]"],
        "model.init_args.units[1].rate: was 0.02, is 0.5;",
    ),
]


@pytest.mark.fault(24)
@pytest.mark.parametrize("number", range(len(CHANGES)), ids=[words[0] for words, _ in CHANGES])
def test_another_configuration_is_refused_with_what_changed(
    number: int, tiny_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = CHANGES[number]
    way = ("--resume", "--ckpt_path")[number % 2]
    monkeypatch.setattr(DomainDataModule, "setup", lambda *_: pytest.fail("data were read"))
    before = LAST.read_bytes()
    line = refusal(capsys, "--config", str(tiny_run.config), way, str(LAST), *words)
    assert "the checkpoint is of a run with another configuration: " in line
    assert expected in line
    assert line.count(": was ") == (2 if "head_options" in expected else 1)
    assert LAST.read_bytes() == before
    assert not list(Path("runs").glob("*/version_1"))


def test_what_results_do_not_depend_on_may_change(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trainer.max_epochs", "3", "--data.num_workers", "1", "--trainer.strategy", "ddp", "--name", "other"]
    words += ["--trainer.log_every_n_steps", "1", f"{INIT}.cache_dir", "features"]
    assert main(["fit", "--config", str(tiny_run.config), "--ckpt_path", str(LAST), *words]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert said == ["note: trainer.strategy: was auto, is ddp; results do not depend on it, but for rounding"]
    assert read_checkpoint("runs/other/version_0/checkpoints/last.ckpt")["epoch"] == 2


def test_the_keyword_of_a_checkpoint_is_no_file(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(tiny_run.config), "--ckpt_path", "last"]
    assert "go on with a fit by --resume auto" in refusal(capsys, *words)


def test_a_checkpoint_that_says_nothing_is_not_compared(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = read_checkpoint(LAST)
    del checkpoint["modmeta_run"]
    AtomicCheckpointIO().save_checkpoint(checkpoint, LAST)
    assert main(["fit", "--config", str(tiny_run.config), "--resume", "auto", "--data.queries", "3"]) == 0
    assert "neither configuration nor data are compared" in capsys.readouterr().out


def a_folder(root: Path, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for domain in ("day", "dusk", "night"):
        for name in ("cat", "dog"):
            (root / domain / name).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / domain / name / f"{number}.png")
    return root


DATA = [
    "--data.test_domains", "[night]", "--data.val_domains", "[dusk]", "--data.ways", "2", "--data.shots", "1",
    "--data.eval_shots", "[1]", "--data.queries", "1", "--data.steps_per_epoch", "1", "--data.val_episodes", "1",
    "--data.batch_size", "4", "--test_after_fit", "false",
]  # fmt: skip


@pytest.fixture
def on_a_folder(tiny_run: Run) -> list[str]:
    """Fit for one epoch on a folder, and return the words that go on."""
    a_folder(Path("images"))
    words = ["--config", str(tiny_run.config), "--name", "folder", *DATA]
    assert main(["fit", *words, "--data.root", "images", "--trainer.max_epochs", "1"]) == 0
    return [*words, "--resume", "auto"]


@pytest.mark.fault(24)
def test_other_data_are_refused_and_moved_data_are_not(
    on_a_folder: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("images", "wrong")
    Path("wrong/night/cat/0.png").unlink()
    line = refusal(capsys, *on_a_folder, "--data.root", "wrong")
    assert "the data are not those of the checkpoint: domain 'night': was 8 images, is 7; bring them back" in line
    a_folder(Path("others"), seed=1)
    line = refusal(capsys, *on_a_folder, "--data.root", "others")
    assert "as many in each domain, but not the same names or content" in line
    shutil.copytree("images", "moved", copy_function=shutil.copyfile)
    for file in Path("moved").rglob("*.png"):
        os.utime(file, (0, 0))
    assert main(["fit", *on_a_folder, "--data.root", "moved"]) == 0


def test_the_identity_of_data_is_their_names_and_content() -> None:
    was = describe_data(DomainFolder(a_folder(Path("a")), 8))
    assert was["images"] == {"day": 8, "dusk": 8, "night": 8}
    shutil.copytree("a", "b")
    os.utime("b/day/cat/0.png", (0, 0))
    refuse_other_data(was, describe_data(DomainFolder("b", 8)))
    assert DomainFolder("b", 8).key != DomainFolder("a", 8).key  # which caches go by
    first, second = (Path("b/day/cat") / name for name in ("0.png", "1.png"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ModmetaError, match="not the same names or content"):
        refuse_other_data(was, describe_data(DomainFolder("b", 8)))


def test_a_backbone_of_other_weights_is_refused(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def weights(seed: int) -> dict[str, Any]:
        return {k: v.contiguous() for k, v in Backbone("test_efficientnet", False, 32, seed).model.state_dict().items()}

    save_file(weights(1), "weights.safetensors")
    words = ["--config", str(tiny_run.config), "--name", "frozen", f"{INIT}.source.epochs", "0"]
    words += ["--trainer.max_epochs", "1", "--test_after_fit", "false"]
    assert main(["fit", *words, f"{INIT}.backbone.pretrained", "weights.safetensors"]) == 0
    shutil.copy("weights.safetensors", "moved.safetensors")
    go_on = [*words, "--resume", "auto", f"{INIT}.backbone.pretrained"]
    assert main(["fit", *go_on, "moved.safetensors"]) == 0
    save_file(weights(2), "weights.safetensors")
    assert "for another backbone fingerprint: it has sha256:" in refusal(capsys, *go_on, "weights.safetensors")


@pytest.mark.fault(29)
def test_tensors_of_another_shape_are_named(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ckpt_path", str(LAST), f"{INIT}.steps", "5"]
    capsys.readouterr()
    assert main(["test", *words]) == 2
    error = capsys.readouterr().err
    assert "the checkpoint does not fit the model: tensor policy." in error
    assert error.count("\n") == 1


def test_a_test_on_other_data_is_allowed(tiny_run: Run) -> None:
    words = ["--ckpt_path", str(LAST), "--data.test_domains", "[ink]", "--data.ways", "3", "--name", "transfer"]
    assert main(["test", *words]) == 0
    assert Path("runs/transfer/version_0/results.json").is_file()
