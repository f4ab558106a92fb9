"""A learner whose features are read off middle layers, too, and features kept on disk under the right name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BACKBONE, digits, modular, source, trainer

from modmeta.learners import MetaLearner, load_learner
from modmeta.learners.loading import read_checkpoint

TAPPED = replace(BACKBONE, taps=("blocks.0",))


def fit(folder: Path, epochs: int, **changes: Any) -> tuple[MetaLearner, Path]:
    learner = modular(**changes)
    run = trainer(folder, epochs)
    run.fit(learner, datamodule=digits())
    run.save_checkpoint(folder / "last.ckpt")
    return learner, folder / "last.ckpt"


def figures(learner: MetaLearner, folder: Path, checkpoint: Path | None = None) -> list[dict[str, Any]]:
    trainer(folder, 1).test(learner, datamodule=digits(), ckpt_path=checkpoint, weights_only=True, verbose=False)
    return [result.to_dict() for result in learner.results if result.metric != "seconds"]


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_tapped_learner_comes_back_from_its_checkpoint(epochs: int, tmp_path: Path) -> None:
    learner, checkpoint = fit(tmp_path, epochs + 1, backbone=TAPPED, source=source(epochs))
    backbone = learner.model.backbone
    assert not torch.equal(backbone.tap_scale, torch.ones_like(backbone.tap_scale))
    assert learner.sources.mean.shape[1] == backbone.feature_dim > backbone.own_dim
    expected = figures(learner, tmp_path)
    again = load_learner(checkpoint)
    assert torch.equal(again.model.backbone.tap_scale, backbone.tap_scale)
    assert again.model.backbone.fingerprint() == backbone.fingerprint()
    assert figures(again, tmp_path) == expected
    assert figures(modular(backbone=TAPPED, source=source(epochs)), tmp_path, checkpoint) == expected


def test_features_on_disk_are_those_of_the_checkpoint_that_is_tested(tmp_path: Path) -> None:
    """Lightning loads a checkpoint after ``setup``; a cache named before that held the features of other weights."""
    cached = {"source": source(1), "cache_dir": str(tmp_path / "cache")}
    checkpoints = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        # The two backbones differ by their initial weights alone, which their checkpoints replace.
        checkpoints.append(fit(folder, 2, backbone=replace(BACKBONE, seed=seed), source=source(1))[1])
    assert not torch.equal(*(weights(path) for path in checkpoints))
    for path in checkpoints:
        apart = figures(modular(source=source(1)), tmp_path, path)
        assert figures(modular(**cached), tmp_path, path) == apart
        assert figures(modular(**cached), tmp_path, path) == apart  # from the rows on disk


def weights(checkpoint: Path) -> torch.Tensor:
    state = read_checkpoint(checkpoint)["state_dict"]
    return torch.cat([t.flatten() for name, t in state.items() if name.startswith("model.backbone.model.conv_stem")])
