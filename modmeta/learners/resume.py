"""What a checkpoint must say so that a resumed run repeats nothing of its past and skips nothing of its rest."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import Trainer
from torchmetrics import Metric


def settle_progress(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint say that its step is over, and whether validation and the end of the epoch are still to come.

    Lightning takes those two for done when a checkpoint was written behind the last step of an epoch, and goes on
    with what is left of a validation that was broken off. Here they come in full.

    Args:
        trainer: in a fit, or in none: then there is nothing to do.
        checkpoint: is changed in place.
    """
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None:
        return
    loop, progress = trainer.fit_loop.epoch_loop, checkpoint["loops"]["fit_loop"]
    steps, validation = progress["epoch_loop.batch_progress"], progress["epoch_loop.val_loop.batch_progress"]
    at_end_of_step = steps["current"]["completed"] < steps["current"]["processed"]
    if at_end_of_step:
        pending = loop._should_check_val_fx(fetcher)
        for count in ("total", "current"):
            steps[count]["completed"] = steps[count]["processed"]
        if not pending:
            progress["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    else:
        count = validation["current"]
        pending = trainer.validating and not (validation["is_last_batch"] and count["completed"] == count["ready"])
    if pending:
        # The mark of a validation that was broken off, at its very beginning.
        for count in ("total", "current"):
            validation[count] = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
        validation["is_last_batch"] = False


def metric_state(metric: Metric) -> dict[str, Any]:
    """Return what a metric has seen on all ranks; each of them must ask."""
    with metric.sync_context():
        return copy.deepcopy(metric.metric_state)


def restore_metric(metric: Metric, state: dict[str, Any], first: bool) -> None:
    """Let a metric go on from :func:`metric_state`.

    Args:
        metric: the metric.
        state: what all ranks had seen.
        first: whether this is the first rank. It takes everything, and the others nothing.
    """
    metric.reset()
    metric._update_count = 1  # or it would warn that it was never updated
    if first:
        for name, value in state.items():
            setattr(metric, name, value.to(metric.device))
