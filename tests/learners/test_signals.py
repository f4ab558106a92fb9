"""SIGTERM and SIGINT: the step is finished, a checkpoint saved, the exit code right, and nothing is lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from traced import EPOCHS, At, Notes, Traced, fit

from modmeta.cli import main
from modmeta.files import write_atomically
from modmeta.learners import read_checkpoint
from modmeta.learners.interruption import INTERRUPTED, Interruption

SIGNALS = pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
BOTH = [
    pytest.param(signal.SIGTERM, marks=pytest.mark.fault(22)),
    pytest.param(signal.SIGINT, marks=pytest.mark.fault(23)),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before
    signal.signal(signal.SIGINT, own)


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def interrupted(folder: Path, act: At, **changes: Any) -> tuple[int | str | None, Notes]:
    """Fit until a signal stops it; return the exit code and what was logged by then."""
    notes, callbacks = Notes(), [ModelCheckpoint(folder), Interruption(), act]
    with pytest.raises(SystemExit) as stop:
        fit(folder, callbacks=callbacks, notes=notes, enable_checkpointing=True, **changes)
    return stop.value.code, notes


@pytest.mark.parametrize("signum", BOTH)
@pytest.mark.parametrize("step", [1, 3])
def test_the_step_is_finished_and_the_rest_comes_later(step: int, signum: int, whole: Traced, tmp_path: Path) -> None:
    code, notes = interrupted(tmp_path, At(send(signum), step=step))
    assert code == 128 + signum
    assert torch.load(tmp_path / INTERRUPTED, weights_only=True)["global_step"] == step
    resumed = fit(tmp_path, resume=tmp_path / INTERRUPTED)
    assert resumed.ends_like(whole)
    assert notes.rows + resumed.rows == whole.rows


@pytest.mark.fault(22, 23)
@pytest.mark.parametrize("where", [{"step": 4}, {"validation": 1}])
def test_a_validation_is_broken_off_and_comes_later(where: dict[str, int], whole: Traced, tmp_path: Path) -> None:
    code, notes = interrupted(tmp_path, At(send(signal.SIGTERM), **where))
    assert code == 143
    assert not any(name.startswith("val/") for name, *_ in notes.rows)
    resumed = fit(tmp_path, resume=tmp_path / INTERRUPTED)
    assert resumed.ends_like(whole)
    assert notes.rows + resumed.rows == whole.rows


def test_without_validation_the_epoch_ends_first(tmp_path: Path) -> None:
    interrupted(tmp_path, At(send(signal.SIGTERM), step=4), limit_val_batches=0)
    resumed = fit(tmp_path, resume=tmp_path / INTERRUPTED, limit_val_batches=0)
    assert resumed.ends_like(fit(tmp_path, limit_val_batches=0))
    assert [row[1] for row in resumed.rows] == [4, 5]


@pytest.mark.fault(22)
def test_a_signal_behind_the_last_step_counts_too(whole: Traced, tmp_path: Path) -> None:
    class AtTheEnd(At):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == EPOCHS - 1:
                self.act()

    code, notes = interrupted(tmp_path, AtTheEnd(send(signal.SIGTERM)))
    assert code == 143
    assert notes.rows == whole.rows
    resumed = fit(tmp_path, resume=tmp_path / INTERRUPTED)
    assert resumed.ends_like(whole)
    assert not resumed.rows


class Left(BaseException):
    """Stands for the end of the process."""


@pytest.mark.fault(22, 23)
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr("modmeta.learners.interruption.os._exit", leave)

    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGINT)()

    callbacks = [ModelCheckpoint(tmp_path), Interruption(), At(twice, step=3)]
    with pytest.raises(Left, match="130"):
        fit(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    assert not (tmp_path / INTERRUPTED).exists()


def test_nothing_is_saved_where_no_checkpoints_are_wanted(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, callbacks=[Interruption(), At(send(signal.SIGTERM), step=1)])
    assert stop.value.code == 143
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("measure", ["validate", "test"])
@SIGNALS
def test_measuring_ends_cleanly(measure: str, signum: int, code: int, tmp_path: Path) -> None:
    class Once(Callback):
        seen = 0

        def on_test_batch_end(self, *args: object) -> None:
            Once.seen += 1
            os.kill(os.getpid(), signum)

        on_validation_batch_end = on_test_batch_end

    learner, data = tiny.head_only(source_images=2), tiny.digits()
    tiny.trainer(tmp_path, 1).fit(learner, datamodule=data)
    trainer = tiny.trainer(tmp_path, 1, callbacks=[Interruption(), Once()], limit_val_batches=1.0)
    with pytest.raises(SystemExit) as stop:
        getattr(trainer, measure)(learner, datamodule=data, verbose=False)
    assert stop.value.code == code
    assert Once.seen == 1
    assert not hasattr(learner, "results")


# ---------------------------------------------------------------------- the command line

CONFIG = """
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
modules: [signalling.py]
data: {val_domains: [slanted], test_domains: [neon], ways: 3, shots: 2, eval_shots: [2], queries: 2,
       steps_per_epoch: 3, episodes_per_step: 1, val_episodes: 1, test_episodes: 1, batch_size: 8}
model:
  class_path: signalling.Signalling
  init_args: {backbone: {name: test_efficientnet, pretrained: false, image_size: 32}, source_images: 2}
"""
MODULE = """
import os, signal
from modmeta.learners import MetaLearner


class Signalling(MetaLearner):
    def episode_loss(self, episode):
        wanted = os.environ.get("SIGNALS", "").split()
        if episode.index == int(os.environ.get("SIGNALLED", 1)):
            for name in wanted:
                os.kill(os.getpid(), getattr(signal, name))
        return super().episode_loss(episode)
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    module = tmp_path.name  # a process knows only one module of a name
    Path(f"{module}.py").write_text(MODULE)
    Path("run.yaml").write_text(CONFIG.replace("signalling", module))
    return "run.yaml"


@pytest.mark.fault(22, 23)
@pytest.mark.parametrize(("name", "code", "episode"), [("SIGTERM", 143, 1), ("SIGINT", 130, 2)])
def test_a_run_is_stopped_and_resumed(
    name: str, code: int, episode: int, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNALS", name)
    monkeypatch.setenv("SIGNALLED", str(episode))  # the second or the last step of an epoch
    assert main(["fit", "--config", config, "--name", "stopped"]) == code
    file = Path("runs/stopped/version_0/checkpoints", INTERRUPTED)
    assert read_checkpoint(file)["global_step"] == episode + 1
    monkeypatch.delenv("SIGNALS")
    assert main(["fit", "--config", config, "--name", "whole"]) == 0
    assert main(["fit", "--config", config, "--name", "stopped", "--resume", "auto"]) == 0
    ends = [read_checkpoint(f"runs/{name}/version_0/checkpoints/last.ckpt") for name in ("stopped", "whole")]
    for name, tensor in ends[0]["state_dict"].items():
        assert not isinstance(tensor, torch.Tensor) or torch.equal(tensor, ends[1]["state_dict"][name])
    stopped, whole = (Path(f"runs/{name}/version_0/metrics.csv").read_text() for name in ("stopped", "whole"))
    assert without_times(stopped) == without_times(whole)


def without_times(metrics: str) -> list[list[str]]:
    head, *rows = (line.split(",") for line in metrics.splitlines())
    kept = [place for place, name in enumerate(head) if not name.endswith("seconds")]
    return [[row[place] for place in kept] for row in [head, *rows]]


def test_two_signals_to_a_process(config: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modmeta", "fit", "--config", config, "--name", "twice"],
        env=os.environ | {"SIGNALS": "SIGTERM SIGTERM"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 143
    assert "Traceback" not in done.stderr
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.fault(22, 23)
@SIGNALS
def test_a_command_without_a_trainer_leaves_no_temporary_file(
    signum: int, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("old")

    def write(*args: object) -> None:
        monkeypatch.setattr("os.fsync", lambda handle: os.kill(os.getpid(), signum))
        write_atomically("out", b"new")

    monkeypatch.setattr("modmeta.commands.modules.run", write)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["modules"]) == code
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Path("out").read_text() == "old"
