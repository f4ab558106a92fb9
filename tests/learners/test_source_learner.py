"""Source training on its own: what it writes, and that another learner can go on from it."""

from pathlib import Path

import pytest
import tiny
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from traced import Keeper, same

from modmeta.backbone import Backbone
from modmeta.data import DomainDataModule
from modmeta.learners import AlignmentConfig, BackboneConfig, SourceConfig, SourceLearner


def test_a_trained_backbone_is_written_for_others_to_start_from(tmp_path: Path) -> None:
    learner = SourceLearner(BackboneConfig("test_resnet", pretrained=False, image_size=32))
    before = learner.backbone.fingerprint()
    data = DomainDataModule("digits", test_domains=["paper"], image_size=32, steps_per_epoch=3, batch_size=16)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(tmp_path, "source"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(learner, datamodule=data)
    assert learner.backbone.fingerprint() != before
    assert not learner.backbone.model.training
    (file,) = tmp_path.glob("source/*/backbone.safetensors")
    again = Backbone("test_resnet", str(file), image_size=32)
    assert again.fingerprint() == learner.backbone.fingerprint()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), learner.backbone(images))


@pytest.mark.parametrize("name", [None, "group_dro", "mixup"])
def test_a_fit_that_is_resumed_within_an_epoch_ends_where_a_whole_one_does(name: str | None, tmp_path: Path) -> None:
    def fit(resume: Path | None = None) -> tuple[SourceLearner, list[Path]]:
        torch.manual_seed(0)
        alignment = None if name is None else AlignmentConfig(name)
        learner = SourceLearner(tiny.BACKBONE, SourceConfig(alignment=alignment))
        keeper = Keeper(tmp_path)
        trainer = tiny.trainer(tmp_path, 2, callbacks=[] if resume else [keeper])
        trainer.fit(learner, datamodule=tiny.digits(), ckpt_path=resume)
        return learner, keeper.files

    whole, files = fit()
    for file in files:
        if file.stem in ("step-1", "epoch-2", "step-3"):
            resumed, _ = fit(file)
            assert same(dict(resumed.state_dict()), dict(whole.state_dict())), file.stem
