import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image

from modmeta.data import SHIFTS, DomainDataModule, Episode, SourceBatch
from modmeta.errors import ModmetaError


def module(**arguments: Any) -> DomainDataModule:
    made = DomainDataModule(**arguments)
    made.setup()
    return made


def test_domains_that_are_not_named_are_for_training() -> None:
    made = module(val_domains=["ink"], test_domains=["sketch", "neon"])
    assert made.train_domains == ("blurred", "chalk", "paper", "slanted")
    assert made.val_domains == ("ink",)
    assert made.test_domains == ("sketch", "neon")
    assert made.classes == tuple("0123456789")
    assert {made.episode("train", index).domain for index in range(40)} == set(made.train_domains)
    assert {made.episode("test", index).domain for index in range(40)} == {"sketch", "neon"}


def test_validation_without_domains_uses_held_out_families() -> None:
    made = module(test_domains=["ink"], held_out_shifts=["fog", "hue"], val_episodes=3, eval_shots=[1])
    episodes = [made.episode("val", index) for index in range(18)]
    assert {episode.domain for episode in episodes} == set(made.train_domains)
    assert {episode.shift for episode in episodes} == {"fog", "hue"}
    trained = {made.episode("train", index).shift for index in range(300)}
    assert trained == {None, *SHIFTS} - {"fog", "hue"}


def test_real_domains_are_not_shifted() -> None:
    made = module(val_domains=["ink"], test_domains=["sketch"], val_episodes=2, test_episodes=2)
    for split in ("val", "test"):
        assert all(made.episode(split, index).shift is None for index in range(6))


def test_evaluation_may_judge_by_more_queries_than_training() -> None:
    arguments = {"ways": 3, "shots": 1, "eval_shots": [2], "queries": 2, "eval_queries": 7}
    made = module(val_domains=["ink"], test_domains=["sketch"], **arguments)
    assert len(made.episode("train", 0).query) == 3 * 2
    assert len(made.episode("val", 0).query) == len(made.episode("test", 0).query) == 3 * 7
    assert len(module(test_domains=["sketch"], queries=3).episode("test", 0).query) == 10 * 3


def test_without_held_out_families_validation_is_plain() -> None:
    assert module(held_out_shifts=[]).episode("val", 0).shift is None


def test_new_classes_never_occur_in_training() -> None:
    made = module(val_classes=["7", "6"], test_classes=["8", "9"], test_domains=["ink"], source_share=0.4, queries=3)
    assert made.classes == tuple("012345")
    assert made.episode("val", 0).classes == ("6", "7")
    assert made.episode("test", 0).classes == ("8", "9")
    assert all(made.episode("train", index).classes == made.classes for index in range(10))
    labels = torch.cat([labels for _, _, labels, _ in made.source_images()])
    assert labels.unique().tolist() == list(range(6))


def test_new_classes_can_be_tested_on_the_training_domains() -> None:
    made = module(test_classes=["8", "9"])
    assert made.test_domains == made.train_domains
    assert made.episode("test", 0).shift is None


def test_source_share_divides_the_images() -> None:
    made = module(test_domains=["ink"], source_share=0.5, shots=(1, 5), eval_shots=[5], queries=5)
    source = {row for _, _, _, ids in made.source_images() for row in ids.tolist()}
    drawn = set()
    for split in ("train", "val"):
        for index in range(100):
            episode = made.episode(split, index)
            drawn |= set(episode.support_ids.tolist()) | set(episode.query_ids.tolist())
    assert source.isdisjoint(drawn)
    assert len(source | drawn) == sum(made.store.row_domains != made.store.domains.index("ink"))


def test_source_images_come_domain_by_domain() -> None:
    made = module(test_domains=["ink"])
    chunks = list(made.source_images())
    assert list(dict.fromkeys(domain for domain, *_ in chunks)) == list(made.train_domains)
    assert max(len(images) for _, images, _, _ in chunks) == 256
    limited = list(made.source_images(limit_per_class=3))
    assert [len(images) for _, images, _, _ in limited] == [30] * 6
    for domain, images, labels, ids in limited:
        assert torch.equal(images, made.store.load(ids))
        assert {made.store.domains[i] for i in made.store.row_domains[ids]} == {domain}
        assert made.store.row_classes[ids].tolist() == labels.tolist()


def test_source_batches_are_balanced() -> None:
    made = module(test_domains=["ink"], batch_size=6000)
    batch = made._source.batch(0)
    assert batch.labels.bincount().min() > 480
    assert batch.domains.bincount(minlength=6).min() > 850


WRONG = [
    ({"test_domains": ["scetch"]}, "unknown domain 'scetch' in test_domains; did you mean 'sketch'?"),
    ({"val_classes": ["11"]}, "unknown class '11' in val_classes; "),
    ({"held_out_shifts": ["fogg"]}, "unknown shift 'fogg' in held_out_shifts; did you mean 'fog'?"),
    (
        {"val_domains": ["ink"], "test_domains": ["ink"]},
        "domain 'ink' is in both val_domains and test_domains",
    ),
    ({"train_domains": ["ink"], "test_domains": ["ink"]}, "'ink' is in both train_domains and test_domains"),
    ({"val_classes": ["1"], "test_classes": ["1"]}, "class '1' is in both val_classes and test_classes"),
    (
        {"test_domains": ["blurred", "chalk", "ink", "neon", "paper", "sketch", "slanted"]},
        "leave no domain for training",
    ),
    ({"test_classes": list("0123456789")}, "leave no class for training"),
    ({"ways": 11}, "domain 'blurred' has 10 classes for train episodes, and ways asks for 11"),
    ({"test_classes": ["1", "2"], "ways": 5}, "domain 'blurred' has 2 classes for test episodes"),
    ({"test_classes": ["1"]}, "has 1 classes for test episodes, and ways asks for 2"),
    (
        {"shots": 20},
        "domain 'blurred' has 26 images of class '0' for train episodes, and 20 shots + 10 queries",
    ),
    ({"eval_shots": [1, 20]}, "for val episodes, and 20 shots + 10 queries ask for 30"),
    ({"source_share": 0.9}, "has 3 images of class '0' for train episodes"),
    ({"source_share": 0.0}, "source_share=0.0 must lie above 0"),
    ({"source_share": 1.5}, "source_share=1.5 must lie"),
    ({"shift_share": -1.0}, "shift_share=-1.0 must lie in 0..1"),
    ({"ways": 1}, "ways=1 is no range"),
    ({"shots": (5, 2)}, "shots=(5, 2) is no range"),
    ({"shots": 0}, "shots=0 is no range"),
    ({"eval_shots": []}, "eval_shots=[] must hold"),
    ({"queries": 0}, "queries=0 is too small; it must be 1 or more"),
    ({"eval_queries": 0}, "eval_queries=0 is too small; it must be 1 or more"),
    ({"eval_queries": 20}, "for val episodes, and 10 shots + 20 queries ask for 30"),
    ({"seed": -1}, "seed=-1 is too small"),
    ({"root": "/nowhere"}, "the data folder /nowhere does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_named_before_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModmetaError) as caught:
        module(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_to_test_on() -> None:
    with pytest.raises(ModmetaError, match="nothing to test on"):
        DomainDataModule().setup("test")
    with pytest.raises(ModmetaError, match="nothing to test on"):
        module().test_dataloader()
    with pytest.raises(ModmetaError, match="unknown split 'tset'"):
        module().episode("tset", 0)


def test_hyper_parameters_are_plain() -> None:
    hparams = dict(DomainDataModule(test_domains=["ink"], ways=(2, 5)).hparams)
    plain = (str, int, float, list, tuple, type(None))
    assert all(isinstance(value, plain) for value in hparams.values())
    assert b"torch" not in pickle.dumps(hparams)


@pytest.mark.filterwarnings("ignore:.*lie in two domains")
def test_a_folder_of_domains(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = make_folder("art photo", "cat dog owl", images=4)
    make_folder("sketch", "cat dog", images=4)
    made = module(
        root=str(root), test_domains=["sketch"], shots=(1, 2), eval_shots=[1, 2], queries=2,
        cache_dir=str(tmp_path / "cache"), image_size=16,
    )  # fmt: skip
    assert made.episode("train", 0).support.shape[1:] == (3, 16, 16)
    assert made.episode("train", 0).classes == ("cat", "dog", "owl")
    assert made.episode("test", 0).classes == ("cat", "dog")
    made.setup("test")  # a second time, as Lightning does
    assert made.classes == ("cat", "dog", "owl")


@pytest.mark.fault(15)
@pytest.mark.filterwarnings("ignore:.*copies and not used")
def test_copies_never_straddle_support_query_or_source(make_folder: Callable[..., Path]) -> None:
    root = make_folder("art photo", "cat dog", images=8)
    for path in list(root.rglob("*.png")):
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))  # the same pixels in another file
    made = module(
        root=str(root), shots=(1, 2), eval_shots=[2], queries=2, image_size=12, source_share=0.5, shift_share=0.0
    )
    source = {image.numpy().tobytes() for _, images, _, _ in made.source_images() for image in images}
    drawn = set()
    for index in range(60):
        episode = made.episode("train", index)
        images = [image.numpy().tobytes() for image in torch.cat([episode.support, episode.query])]
        assert len(set(images)) == len(images)
        drawn |= set(images)
    assert len(source) == len(drawn) == 16
    assert source.isdisjoint(drawn)


@pytest.mark.fault(1)
@pytest.mark.filterwarnings("ignore:.*quarantined and not used")
def test_bad_images_are_errors_only_when_asked_for(make_folder: Callable[..., Path]) -> None:
    root = make_folder(images=4)
    (root / "art" / "cat" / "2.png").write_bytes(b"")
    wanted = {"root": str(root), "shots": 1, "eval_shots": [1], "queries": 2, "image_size": 12}
    made = module(**wanted)
    assert [found.relative for found in made.store.quarantined] == ["art/cat/2.png"]
    assert {row for i in range(50) for row in made.episode("train", i).query_ids.tolist()} == set(range(15))
    with pytest.raises(ModmetaError, match=r"art/cat/2\.png, is empty"):
        module(**wanted, strict_images=True)


class Learner(LightningModule):
    source_epochs = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def training_step(self, batch: SourceBatch | list[Episode], index: int) -> torch.Tensor:
        if isinstance(batch, SourceBatch):
            self.seen.append(f"source {len(batch.images)}")
        else:
            self.seen.append("train " + " ".join(str(episode.index) for episode in batch))
        return self.weight**2

    def validation_step(self, batch: list[Episode], index: int) -> None:
        self.seen.append(f"val {batch[0].index}")

    def test_step(self, batch: list[Episode], index: int) -> None:
        self.seen.append(f"test {batch[0].index}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_runs_both_phases() -> None:
    made = DomainDataModule(
        train_domains=["ink", "neon"], val_domains=["paper"], test_domains=["sketch"], steps_per_epoch=2,
        episodes_per_step=2, val_episodes=1, eval_shots=[1, 2], test_episodes=1, batch_size=6, queries=2,
    )  # fmt: skip
    learner = Learner()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(learner, made)
    trainer.test(learner, made, verbose=False)
    assert learner.seen == [
        "source 6", "source 6", "val 0", "val 1",
        "train 0 1", "train 2 3", "val 0", "val 1",
        "test 0", "test 1",
    ]  # fmt: skip
