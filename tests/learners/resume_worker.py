"""Fits of the two-process tests of resuming: ``python resume_worker.py FOLDER``; every rank writes what it found.

In the end the second rank is killed in the middle of a fit.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from traced import At, fit

from modmeta.learners import AtomicCheckpointIO
from modmeta.learners.interruption import INTERRUPTED, Interruption


def main(folder: Path) -> None:
    two = {"devices": 2, "strategy": "ddp"}
    whole = fit(folder, "modular", **two)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    report = []

    def hears(signum: int) -> Callable[[], None]:
        # One rank alone, and not the first.
        return lambda: os.kill(os.getpid(), signum) if rank == 1 else None

    callbacks = [ModelCheckpoint(folder / "kept"), Interruption(), At(hears(signal.SIGTERM), step=3)]
    try:
        fit(folder, "modular", callbacks=callbacks, enable_checkpointing=True, **two)
    except SystemExit as stop:
        file = folder / "kept" / INTERRUPTED
        steps = torch.load(file, weights_only=True)["global_step"]
        # The first rank's exit code is the run's.
        report.append(f"interrupted after {steps} {stop.code == (143 if rank == 0 else 0)}")
        resumed = fit(folder, "modular", resume=file, **two)
        report.append(f"resumed {resumed.ends_like(whole)}")
    Path(folder, f"rank-{rank}.txt").write_text("\n".join(report))
    keeper = ModelCheckpoint(folder / "lost", filename="last", every_n_train_steps=1, enable_version_counter=False)
    safely = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()], **two}
    fit(folder, callbacks=[keeper, At(hears(signal.SIGKILL), step=4)], **safely)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
