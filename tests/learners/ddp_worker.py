"""One fit of the two-process test: ``python ddp_worker.py FOLDER DEVICES``; every rank writes what it saw."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from modmeta.data import Episode, SourceBatch
from modmeta.learners import ModularMetaLearner


class Watched(ModularMetaLearner):
    """Notes its episodes and the gradient of its first step, as the optimiser gets it before clipping."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.indices: list[list[int]] = []
        self.first: dict[str, Tensor] = {}

    def training_step(self, batch: list[Episode] | SourceBatch, batch_idx: int) -> None:
        if not isinstance(batch, SourceBatch):
            self.indices.append([episode.index for episode in batch])
        super().training_step(batch, batch_idx)

    def manual_backward(self, loss: Tensor, *args: object, **kwargs: object) -> None:
        super().manual_backward(loss, *args, **kwargs)
        if self.indices and not self.first:
            named = [(name, p) for name, p in self.named_parameters() if p.requires_grad and p.grad is not None]
            self.first = {name: p.grad.clone() for name, p in named if not name.startswith("model.backbone")}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def main(folder: Path, devices: int) -> None:

    def trainer(epochs: int) -> Trainer:
        strategy = "ddp" if devices > 1 else "auto"
        return tiny.trainer(folder, epochs, devices=devices, strategy=strategy)

    seen: dict[str, object] = {}
    # Meta-training alone, so that all processes start from the same frozen backbone.
    learner, data = tiny.modular(Watched, learning_rate=1e-2), tiny.digits(episodes_per_step=4)
    fit = trainer(1)
    fit.fit(learner, datamodule=data)
    seen |= {"indices": learner.indices, "gradient": learner.first, "weights": tensors(learner)}
    if devices == 1:
        fit.save_checkpoint(folder / "one.ckpt")
    # One checkpoint, tested on any number of processes.
    learner = tiny.modular(Watched, learning_rate=1e-2)
    trainer(1).test(learner, datamodule=tiny.digits(), ckpt_path=str(folder / "one.ckpt"), verbose=False)
    seen["results"] = [r.to_dict() for r in learner.results if r.metric != "seconds"]
    # Both phases.
    learner = tiny.modular(Watched, source=tiny.source())
    fit = trainer(2)
    fit.fit(learner, datamodule=tiny.digits(batch_size=32))
    seen |= {"both": tensors(learner), "sources": learner.sources.get_extra_state()["tensors"]}
    torch.save(seen, folder / f"{devices}-{fit.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
