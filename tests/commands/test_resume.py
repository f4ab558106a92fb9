"""fit --resume: a run goes on in its own folder, from the newest checkpoint that is sound."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from finished_run import Run

from modmeta.cli import main
from modmeta.learners import read_checkpoint

FOLDER = Path("runs/tiny/version_0")
LAST = FOLDER / "checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def _a_run_of_two_epochs(tiny_run: Run) -> None:
    shutil.copytree(tiny_run.folder, FOLDER)


def fit(*words: str) -> int:
    return main(["fit", *words])


def steps(folder: Path = FOLDER) -> list[int]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_a_run_goes_on_in_its_folder(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(tiny_run.config), "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"]
    before = steps()
    assert fit(*words, "--resume", "auto") == 0
    assert f"resuming {LAST}\n" in capsys.readouterr().out
    assert [path.name for path in FOLDER.parent.iterdir()] == ["version_0"]
    assert [path.name for path in LAST.parent.iterdir()] == ["last.ckpt"]
    assert read_checkpoint(LAST)["epoch"] == 2
    kept = [step for step in before if step < 4]
    assert steps()[: len(kept)] == kept
    assert sorted(set(steps()[len(kept) :])) == [4, 5]
    saved = yaml.safe_load((FOLDER / "config.yaml").read_text())
    assert (saved["name"], saved["trainer"]["max_epochs"], saved["ckpt_path"]) == ("tiny", 3, None)


@pytest.mark.parametrize("given", ["--name", FOLDER, LAST])
def test_it_brings_its_own_configuration(given: Path | str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--resume", "auto", "--name", "tiny"] if given == "--name" else ["--resume", os.path.abspath(given)]
    assert fit(*words, "--trainer.max_epochs", "3", "--test_after_fit", "false") == 0
    assert f"resuming {LAST}\n" in capsys.readouterr().out
    assert read_checkpoint(LAST)["epoch"] == 2
    assert not Path("runs/config").exists()


@pytest.mark.fault(19)
def test_damaged_checkpoints_are_skipped_and_named(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    newer = FOLDER.parent / "version_1" / "checkpoints"
    newer.mkdir(parents=True)
    data = LAST.read_bytes()
    for number, content in enumerate([data[:-1], data.replace(b"modmeta-sha", b"modmeta-shb"), b""]):
        (newer / f"{number}.ckpt").write_bytes(content)
        os.utime(newer / f"{number}.ckpt", (time.time() + 60 + number,) * 2)
    torch.save({"state_dict": {}}, newer / "weights.ckpt")
    os.utime(newer / "weights.ckpt", (time.time() + 70,) * 2)
    assert fit("--config", str(tiny_run.config), "--resume", "auto") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("skipped", "resuming"))]
    assert [line.split("/checkpoints/")[1].split()[0] for line in said] == [
        "weights.ckpt", "2.ckpt", "1.ckpt", "0.ckpt", "last.ckpt",
    ]  # fmt: skip
    assert "holds weights only" in said[0]
    assert "is damaged: its checksum does not fit" in said[2]


def test_the_newest_of_several_counts(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FOLDER, FOLDER.with_name("version_7"))
    os.utime(LAST, (LAST.stat().st_mtime - 60,) * 2)
    assert fit("--config", str(tiny_run.config), "--resume", "auto") == 0
    assert "resuming runs/tiny/version_7/checkpoints/last.ckpt" in capsys.readouterr().out


def test_without_a_checkpoint_a_new_run_begins(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(tiny_run.config), "--trainer.max_epochs", "1", "--resume", "auto"]
    assert fit(*words, "--name", "new") == 0
    assert "nothing to resume in runs/new: a new run begins\n" in capsys.readouterr().out
    assert read_checkpoint("runs/new/version_0/checkpoints/last.ckpt")["epoch"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--resume", "auto"], "which run should go on? Give its configuration or its --name"),
        (["fit", "--resume", "missing.ckpt"], "no valid checkpoint is in missing.ckpt"),
        (["fit", "--resume", "stray.ckpt"], "lies in no run folder; begin a new run from it with --ckpt_path"),
        (["fit", "--resume", str(LAST), "--ckpt_path", str(LAST)], "continues a run and --ckpt_path begins a new one"),
        (["fit", "--resume", str(LAST), "--trainer.logger", "false"], "leave out trainer.logger"),
        (["test", "--resume", "auto", "--ckpt_path", str(LAST)], "resume"),
    ],
)
def test_what_cannot_be_resumed(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(LAST, "stray.ckpt")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_killed_fit_goes_on(tiny_run: Run) -> None:
    shutil.rmtree("runs")
    words = ["fit", "--config", str(tiny_run.config), "--resume", "auto"]
    environment = {**os.environ, "MODMETA_CRASH_AT": "checkpoint:2"}
    done = subprocess.run([sys.executable, "-m", "modmeta", *words], env=environment, capture_output=True, timeout=300)
    assert done.returncode == -9, done.stderr
    assert read_checkpoint(LAST)["epoch"] == 0
    assert main(words) == 0
    assert read_checkpoint(LAST)["epoch"] == 1
    assert [path.name for path in FOLDER.parent.iterdir()] == ["version_0"]
