"""``fit --resume``: the newest valid checkpoint of a run, and the run folder that it continues."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modmeta.errors import ModmetaError
from modmeta.learners.checkpoint_io import load_plain

AUTO = "auto"
_VERSION = re.compile(r"version_(\d+)")


@dataclass(frozen=True)
class Resumed:
    """A run that goes on.

    Attributes:
        checkpoint: the file that it goes on from.
        steps: batches that had been trained on by then.
    """

    checkpoint: Path
    steps: int

    @property
    def folder(self) -> Path:
        """The run folder, ``NAME/version_N``."""
        return self.checkpoint.parent.parent

    @property
    def version(self) -> int:
        """The number of the run folder."""
        return int(self.folder.name.removeprefix("version_"))


def resume(what: str, run: Path) -> Resumed | None:
    """Find the checkpoint that a fit is to go on from, and say which one it is.

    Args:
        what: ``auto`` for the newest valid checkpoint in ``run``; or a checkpoint in a run folder, or the folder of a
            run or of one of its versions.
        run: the folder of a run, in which its versions lie.

    Returns:
        None if ``what`` is ``auto`` and there is no valid checkpoint.

    Raises:
        ModmetaError: if a given checkpoint, or none in a given folder, can be resumed from.
    """
    folder = run if what == AUTO else Path(what)
    found = _read(folder) if folder.is_file() else _newest(folder, must_exist=what != AUTO)
    if found is None:
        _say(f"nothing to resume in {folder}: a new run begins")
    else:
        _say(f"resuming {found.checkpoint}")
    return found


def _newest(folder: Path, must_exist: bool) -> Resumed | None:
    files = {*folder.glob("version_*/checkpoints/*.ckpt"), *folder.glob("checkpoints/*.ckpt")}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True):
        try:
            return _read(file)
        except ModmetaError as error:
            _say(f"skipped: {error}")
    if must_exist:
        raise ModmetaError(f"resume: no valid checkpoint is in {folder}; give a .ckpt file or the folder of a run")
    return None


def _read(file: Path) -> Resumed:
    file = file.absolute()
    if file.parent.name != "checkpoints" or not _VERSION.fullmatch(file.parent.parent.name):
        raise ModmetaError(f"resume: {file} lies in no run folder; begin a new run from it with --ckpt_path")
    checkpoint: dict[str, Any] = load_plain(file)
    if "optimizer_states" not in checkpoint or "loops" not in checkpoint:
        raise ModmetaError(f"checkpoint {file} holds weights only; give one of a modmeta fit")
    here = Path.cwd()
    if file.is_relative_to(here) and len(file.relative_to(here).parts) >= 4:
        # As it was named before: Lightning takes up its own record of checkpoints only if their folder's name is.
        file = file.relative_to(here)
    return Resumed(file, int(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"]))


@rank_zero_only
def _say(message: str) -> None:
    print(message)
