"""A fit that is stopped anywhere and resumed ends where one that was never stopped does, to the bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from traced import EPOCHS, STEPS, At, Notes, Row, Traced, fit, same

from modmeta.data import Episode
from modmeta.learners import MetaLearner, read_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Traced]:
    """Return a fit that was never stopped, and left checkpoints everywhere; each once."""
    made: dict[Any, Traced] = {}

    def make(learner: str = "head_only", **changes: Any) -> Traced:
        key = (learner, *sorted(changes.items()))
        if key not in made:
            made[key] = fit(tmp_path_factory.mktemp("whole"), learner, keep=True, **changes)
        return made[key]

    return make


def named(fitted: Traced, name: str) -> Path:
    (file,) = (file for file in fitted.files if file.stem == name)
    return file


def rest_of(rows: list[Row], steps: int) -> list[Row]:
    """Return what is logged after so many steps: nothing of the past, and the whole end of an epoch."""
    last = next(place for place, row in enumerate(rows) if row[0].endswith("/loss") and row[1] == steps - 1)
    return rows[last + 1 :]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        pytest.param(
            {},
            ["step-1", "step-2", "validation-2", "epoch-2", "step-3", "step-4", "validation-4", "epoch-4", "step-6"],
            marks=pytest.mark.fault(33),
        ),
        ({"limit_val_batches": 0}, ["step-1", "step-2", "epoch-2", "step-4"]),
        ({"val_check_interval": 1}, ["step-3", "validation-3", "validation-4"]),
    ],
)
def test_from_every_checkpoint_that_a_trainer_can_write(
    changes: dict[str, Any], names: list[str], whole: Callable[..., Traced], tmp_path: Path
) -> None:
    expected = whole(**changes)
    for name in names:
        resumed = fit(tmp_path, resume=named(expected, name), **changes)
        assert resumed.ends_like(expected), name
        kind, _, number = name.partition("-")
        if kind == "step":
            assert resumed.rows == rest_of(expected.rows, int(number)), name


@pytest.mark.parametrize("learner", ["modular", "gradient"])
@pytest.mark.parametrize("name", ["step-1", pytest.param("step-3", marks=pytest.mark.fault(33)), "epoch-4"])
def test_learners_within_and_between_epochs_of_both_phases(
    name: str, learner: str, whole: Callable[..., Traced], tmp_path: Path
) -> None:
    expected = whole(learner)
    assert fit(tmp_path, learner, resume=named(expected, name)).ends_like(expected)


@pytest.mark.fault(33)
def test_with_workers(whole: Callable[..., Traced], tmp_path: Path) -> None:
    expected = whole()
    for name in ("step-1", "step-3"):
        assert fit(tmp_path, resume=named(expected, name), data={"num_workers": 2}).ends_like(expected), name


class Killed(BaseException):
    """Ends a fit as abruptly as a callback can."""


def die() -> None:
    raise Killed


@pytest.mark.parametrize("stopped", [4, pytest.param(6, marks=pytest.mark.fault(19, 33))])
def test_from_the_last_checkpoint_before_a_crash(stopped: int, whole: Callable[..., Traced], tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=3, enable_version_counter=False)
    with pytest.raises(Killed):
        fit(tmp_path, callbacks=[keeper, At(die, step=stopped)], enable_checkpointing=True)
    assert fit(tmp_path, resume=tmp_path / "last.ckpt").ends_like(whole())


def test_a_run_may_be_stopped_and_resumed_again_and_again(whole: Callable[..., Traced], tmp_path: Path) -> None:
    resume, rows = None, []
    for step in range(2, STEPS * EPOCHS + 1):
        notes, folder = Notes(), tmp_path / str(step)
        with pytest.raises(Killed):
            fit(folder, resume=resume, callbacks=[At(die, step=step)], keep=True, notes=notes)
        resume, rows = max(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns), rows + notes.rows
    last = fit(tmp_path, resume=resume)
    assert last.ends_like(whole())
    assert rows + last.rows == whole().rows


class Noisy(MetaLearner):
    """Draws from the global generators, as dropout does."""

    def episode_loss(self, episode: Episode) -> Tensor:
        return super().episode_loss(episode) * (1 + torch.rand(()))


def test_noise_without_a_generator_is_a_function_of_the_episode(tmp_path: Path) -> None:
    def noisy() -> MetaLearner:
        return tiny.head_only(Noisy, source=tiny.source())

    expected = fit(tmp_path, noisy(), keep=True)
    assert fit(tmp_path, noisy(), resume=named(expected, "step-3")).ends_like(expected)
    quiet = fit(tmp_path, tiny.head_only(source=tiny.source()))
    assert not same(quiet.state, expected.state)


def test_features_from_the_cache_change_nothing(tmp_path: Path) -> None:
    def learner(folder: str | None = None) -> MetaLearner:
        return tiny.head_only(cache_dir=folder, source_images=2)

    cache = tmp_path / "cache"
    expected = fit(tmp_path, learner(str(cache)))
    assert list(cache.rglob("*"))
    assert fit(tmp_path, learner(str(cache))).ends_like(expected)  # all rows are there already
    in_memory = fit(tmp_path, learner(), keep=True)
    assert in_memory.ends_like(expected)
    # Where a run is resumed, the rows that it had computed before are computed anew.
    assert fit(tmp_path, learner(), resume=named(in_memory, "step-3")).ends_like(expected)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run the fits of ``resume_worker``; the rank that outlives the other has ample time to notice."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, str(Path(__file__).with_name("resume_worker.py")), str(folder)]
    done = subprocess.run(command, cwd=folder, env=tiny.for_ranks(), capture_output=True, text=True, timeout=900)
    return folder, done


@pytest.mark.fault(22, 33)
def test_two_processes(two_processes: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = two_processes
    for rank in (0, 1):
        report = folder / f"rank-{rank}.txt"
        assert report.exists(), done.stderr[-4000:]
        assert report.read_text().split("\n") == ["interrupted after 3 True", "resumed True"]


@pytest.mark.fault(30)
def test_where_one_process_is_killed_the_other_ends_and_the_last_checkpoint_is_sound(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, done = two_processes
    assert done.returncode != 0
    (kept,) = (folder / "lost").iterdir()
    assert read_checkpoint(kept)["global_step"] == 3
    assert [step for name, step, _ in fit(tmp_path, resume=kept).rows if name == "train/loss"] == [3, 4, 5]
