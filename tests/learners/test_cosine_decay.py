import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from family import reptile
from lightning.pytorch import Callback

from modmeta.errors import ModmetaError
from modmeta.learners import BackboneConfig, CosineDecay, SourceLearner


class Rates(Callback):
    """Notes the rates that every step was taken at."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])


def test_the_rate_falls_over_the_episodes_alone(tmp_path: Path) -> None:
    learner, rates = tiny.modular(source=tiny.source(), learning_rate=0.01), Rates()
    data = tiny.digits(steps_per_epoch=3)
    tiny.trainer(tmp_path, 3, callbacks=[CosineDecay(), rates]).fit(learner, datamodule=data)
    meta = [seen[0] for seen in rates.seen]
    assert meta[:3] == [0.01] * 3  # source training
    assert meta[3:] == pytest.approx([0.005 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])
    assert rates.seen[1][1] == pytest.approx(learner.phase.learning_rate(1, 3))  # type: ignore[union-attr]


def test_a_learner_with_a_schedule_of_its_own_is_refused(tmp_path: Path) -> None:
    trainer, data = tiny.trainer(tmp_path, 1, callbacks=[CosineDecay()]), tiny.digits(image_size=28)
    for learner in (reptile(), SourceLearner(BackboneConfig("test_four_block", False, 28))):
        with pytest.raises(ModmetaError, match="has a schedule of its own"):
            trainer.fit(learner, datamodule=data)


def test_a_fit_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match=r"set trainer\.max_epochs"):
        tiny.trainer(tmp_path, -1, callbacks=[CosineDecay()]).fit(tiny.modular(), datamodule=tiny.digits())
