"""fit, validate and test: one folder per run, and nothing that depends on anything outside of it."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from finished_run import Run

from modmeta.cli import main
from modmeta.learners import read_checkpoint

LEARNER = """
from modmeta.learners import ModularMetaLearner


class {name}(ModularMetaLearner):
    def query_loss(self, logits, labels):
        if self.current_epoch >= {epoch}:
            {what}
        return super().query_loss(logits, labels)
"""


def figures(file: Path) -> list[dict]:
    """Return the records of a results file without those that measure time."""
    return [record for record in json.loads(file.read_text()) if record["metric"] != "seconds"]


def test_a_run_lies_in_one_folder(tiny_run: Run) -> None:
    names = {path.relative_to(tiny_run.folder).as_posix() for path in tiny_run.folder.rglob("*")}
    assert {"config.yaml", "results.json", "metrics.csv", "checkpoints/last.ckpt"} <= names
    assert [path.name for path in tiny_run.folder.parent.iterdir()] == ["version_0"]


def test_results_are_records_of_every_system(tiny_run: Run) -> None:
    records = json.loads((tiny_run.folder / "results.json").read_text())
    keys = {"system", "domain", "shots", "ways", "metric", "value", "low", "high", "episodes"}
    assert all(set(record) == keys and math.isfinite(record["value"]) for record in records)
    assert {(r["domain"], r["shots"], r["episodes"]) for r in records} == {("neon", 1, 2), ("neon", 3, 2)}
    assert {"source", "none", "adapted"} <= {record["system"] for record in records}


def test_the_saved_configuration_is_resolved(tiny_run: Run) -> None:
    saved = yaml.safe_load((tiny_run.folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["backbone"]["image_size"] == 32
    assert saved["name"] == "tiny"
    assert "${" not in (tiny_run.folder / "config.yaml").read_text()


def test_the_checkpoint_alone_gives_the_same_figures(tiny_run: Run) -> None:
    assert main(["test", "--ckpt_path", str(tiny_run.checkpoint)]) == 0
    assert figures(Path("runs/tiny/version_0/results.json")) == figures(tiny_run.folder / "results.json")


def test_the_saved_configuration_alone_repeats_the_run(tiny_run: Run) -> None:
    config = str(tiny_run.folder / "config.yaml")
    assert main(["fit", "--config", config]) == 0
    again = Path("runs/tiny/version_0")
    assert figures(again / "results.json") == figures(tiny_run.folder / "results.json")
    first = read_checkpoint(tiny_run.checkpoint)["state_dict"]
    second = read_checkpoint(again / "checkpoints/last.ckpt")["state_dict"]
    assert all(torch.equal(t, second[name]) for name, t in first.items() if isinstance(t, torch.Tensor))
    words = ["validate", "--config", config, "--ckpt_path", str(tiny_run.checkpoint)]
    assert main(words) == 0
    assert {record["domain"] for record in figures(Path("runs/tiny/version_1/results.json"))} == {"slanted"}


def test_the_command_line_beats_the_checkpoint(tiny_run: Run) -> None:
    words = [
        "--ckpt_path",
        str(tiny_run.checkpoint),
        "--data.test_episodes",
        "1",
        "--model.init_args.trust",
        "0.25",
    ]
    assert main(["test", *words, "--name", "other"]) == 0
    saved = yaml.safe_load(Path("runs/other/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["trust"] == 0.25
    assert {record["episodes"] for record in figures(Path("runs/other/version_0/results.json"))} == {1}


def test_a_fit_goes_on_from_a_checkpoint(tiny_run: Run) -> None:
    words = ["--config", str(tiny_run.config), "--ckpt_path", str(tiny_run.checkpoint)]
    assert main(["fit", *words, "--trainer.max_epochs", "3"]) == 0
    checkpoint = read_checkpoint("runs/tiny/version_0/checkpoints/last.ckpt")
    assert checkpoint["epoch"] == 2


def test_a_checkpoint_for_another_backbone(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--config", str(tiny_run.config), "--ckpt_path", str(tiny_run.checkpoint)]
    assert main([*words, "--model.init_args.backbone.name", "test_resnet"]) == 2
    error = capsys.readouterr().err
    assert "the checkpoint is for another backbone: it has test_efficientnet, this model test_resnet" in error
    assert "Traceback" not in error


def test_a_module_in_a_users_file(tiny_run: Run) -> None:
    Path("my_shift_module.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from modmeta.adapters import AdapterModule, register_module\n\n\n"
        '@register_module("my_shift")\n'
        "class MyShift(AdapterModule):\n"
        '    """Shifts the features."""\n\n'
        '    kinds = {"features"}\n\n'
        "    def __init__(self, site):\n"
        "        super().__init__(site)\n"
        "        self.shift = nn.Parameter(torch.zeros(site.channels))\n\n"
        "    def forward(self, x, y):\n"
        "        return y + self.shift\n"
    )
    units = '[{"module": "my_shift"}]'
    words = [
        "--config",
        str(tiny_run.config),
        "--modules",
        "my_shift_module.py",
        "--model.init_args.units",
        units,
    ]
    assert main(["fit", *words, "--name", "own"]) == 0
    # The run's own configuration knows the file.
    assert main(["test", "--ckpt_path", "runs/own/version_0/checkpoints/last.ckpt"]) == 0
    assert Path("runs/own/version_1/results.json").is_file()


def test_a_learner_in_a_users_file_named_in_the_configuration(tiny_run: Run) -> None:
    Path("my_learner.py").write_text(LEARNER.format(name="MyLearner", epoch=0, what="self.called = True"))
    config = yaml.safe_load(tiny_run.config.read_text())
    config["modules"] = ["my_learner.py"]
    config["model"]["class_path"] = "my_learner.MyLearner"
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "mine.yaml"]) == 0
    checkpoint = read_checkpoint("runs/mine/version_0/checkpoints/last.ckpt")
    assert checkpoint["modmeta"]["learner"] == "my_learner.MyLearner"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    what = "return logits.sum() * float('nan')"
    Path("exploding.py").write_text(LEARNER.format(name="Exploding", epoch=2, what=what))
    words = [
        "--config",
        str(tiny_run.config),
        "--modules",
        "exploding.py",
        "--model.class_path",
        "exploding.Exploding",
    ]
    assert main(["fit", *words, "--trainer.max_epochs", "4", "--name", "nan"]) == 2
    error = capsys.readouterr().err
    assert "step " in error
    assert "the loss is nan" in error
    checkpoint = read_checkpoint("runs/nan/version_0/checkpoints/last.ckpt")
    assert checkpoint["epoch"] == 1
    tensors = [value for value in checkpoint["state_dict"].values() if isinstance(value, torch.Tensor)]
    assert all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point())


def test_ctrl_c_during_a_fit(tiny_run: Run) -> None:
    Path("interrupted.py").write_text(LEARNER.format(name="Interrupted", epoch=1, what="raise KeyboardInterrupt"))
    words = [
        "--config",
        str(tiny_run.config),
        "--modules",
        "interrupted.py",
        "--model.class_path",
        "interrupted.Interrupted",
    ]
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(["fit", *words]) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored


def test_two_processes_make_one_run(tiny_run: Run) -> None:
    words = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.episodes_per_step", "2"]
    words += ["--test_after_fit", "true", "--name", "ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "modmeta", "fit", "--config", str(tiny_run.config), *words],
        env=tiny.for_ranks(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run folder: runs/ddp/version_0") == 1
    assert done.stdout.count("95 % interval") == 1
    assert [path.name for path in Path("runs/ddp").iterdir()] == ["version_0"]
    assert len(figures(Path("runs/ddp/version_0/results.json"))) == len(figures(tiny_run.folder / "results.json"))
