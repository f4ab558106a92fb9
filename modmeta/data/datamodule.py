"""The LightningDataModule that turns a set of domains into source batches and episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning import LightningDataModule
from torch import Tensor

from modmeta.data.digits import DigitsDomains
from modmeta.data.draw import EpisodeDraw, EvaluationEpisodes, TrainingEpisodes
from modmeta.data.episode import Episode
from modmeta.data.folders import DomainFolder
from modmeta.data.images import ImageStore
from modmeta.data.own_classes import OwnClasses
from modmeta.data.rotations import RotatedClasses
from modmeta.data.sampler import (
    EpisodeDataset,
    EpisodeLoader,
    EvaluationSampler,
    TrainSampler,
    rank_and_world,
)
from modmeta.data.shifts import SHIFTS
from modmeta.data.source import SourceImages
from modmeta.data.splits import MIXED, Pool, Side, check_pool, mix_pool, share_pool, split_store
from modmeta.errors import ModmetaError, unknown

HELD_OUT_SHIFTS = ("hue", "invert", "motion_blur", "pixelate", "fog")


class DomainDataModule(LightningDataModule):
    """Episodes over the domains of an image collection.

    A training step is a list of episodes, or a :class:`SourceBatch` during the first epochs when the
    learner has an attribute ``source_epochs``. A validation or test step is a list of one episode.
    Everything is a function of ``seed``: no result depends on workers, devices or what was drawn before.

    After :meth:`setup`, ``store`` holds the images, ``classes`` the training classes, and
    ``train_domains``, ``val_domains`` and ``test_domains`` what each split draws from.

    Args:
        root: a folder ``domain/class/image``, or the word ``digits`` for the embedded digits in seven styles.
        own_classes: whether classes of the same name in two domains are two classes, as the first characters of two
            alphabets are; default: domains share classes by name.
        rotations: whether each class, turned by 90, 180 and 270 degrees, gives three more classes.
        mix_domains: whether an episode draws its classes from all domains of its split, as one domain called ``mixed``,
            from which no source domain is hidden; default: from one domain.
        train_domains: default: every domain that is neither for validation nor for test.
        val_domains: default: validate on the training domains under simulated shifts of held-out families.
        test_domains: the domains to test on.
        val_classes: classes that occur in validation only; default: the training classes.
        test_classes: classes that occur in the test only; default: the training classes.
        test_seen_classes: whether test episodes hold the training classes beside ``test_classes``, in test domains
            that training leaves out: generalised zero-shot and few-shot learning.
        image_size: side of the square images in pixels.
        ways: classes per episode, or a range to draw from; default: all.
        eval_ways: the same for validation and test; default: ``ways``.
        shots: support images per class in training; a range is drawn from log-uniformly.
        eval_shots: the numbers of support images per class to validate and test with; 0 for a learner that needs
            none.
        queries: query images per class.
        eval_queries: the same for validation and test, where more of them measure an episode better; default:
            ``queries``.
        episodes_per_step: training episodes in one step, over all devices.
        steps_per_epoch: steps in a training epoch.
        val_episodes: validation episodes per domain and number of shots.
        test_episodes: test episodes per domain and number of shots.
        shift_share: share of the training episodes that go through a simulated shift.
        held_out_shifts: families of simulated shifts that training never uses.
        augment: how far each training image is turned, stretched, slanted and moved on its own, in 0..1; source
            batches too.
        source_share: share of each class in each training domain that source batches and source
            statistics use; episodes then use the rest. With 1 both use everything.
        batch_size: images in a source batch, over all devices.
        num_workers: processes that load data, per device.
        cache_dir: a folder to keep decoded images in; default: in memory.
        strict_images: whether a single image that cannot be used is an error; default: it is left out,
            named in a warning and listed in ``store.quarantined``.
        seed: fixes every draw.

    Raises:
        ModmetaError: for numbers out of range and unknown shifts.
    """

    store: ImageStore
    classes: tuple[str, ...]
    train_domains: tuple[str, ...]
    val_domains: tuple[str, ...]
    test_domains: tuple[str, ...]

    def __init__(
        self,
        root: str = "digits",
        own_classes: bool = False,
        rotations: bool = False,
        mix_domains: bool = False,
        train_domains: list[str] | None = None,
        val_domains: list[str] | None = None,
        test_domains: list[str] | None = None,
        val_classes: list[str] | None = None,
        test_classes: list[str] | None = None,
        test_seen_classes: bool = False,
        image_size: int = 32,
        ways: int | tuple[int, int] | None = None,
        eval_ways: int | tuple[int, int] | None = None,
        shots: int | tuple[int, int] = (1, 10),
        eval_shots: Sequence[int] = (1, 5, 10),
        queries: int = 10,
        eval_queries: int | None = None,
        episodes_per_step: int = 4,
        steps_per_epoch: int = 50,
        val_episodes: int = 20,
        test_episodes: int = 200,
        shift_share: float = 0.5,
        held_out_shifts: Sequence[str] = HELD_OUT_SHIFTS,
        augment: float = 0.0,
        source_share: float = 1.0,
        batch_size: int = 64,
        num_workers: int = 0,
        cache_dir: str | None = None,
        strict_images: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._check_numbers()
        for family in held_out_shifts:
            if family not in SHIFTS:
                raise unknown("shift", family, SHIFTS.names(), "held_out_shifts")
        self._draws: dict[str, EpisodeDraw] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the image collection and check that everything that was asked for can be drawn.

        Raises:
            ModmetaError: for unknown names, overlapping splits, too few classes or images, and a learner that cannot
                do without the images that are left out.
        """
        hparams = self.hparams
        learner = getattr(self.trainer, "lightning_module", None)
        if learner is not None and 0 in hparams["eval_shots"] and not getattr(learner, "zero_shot", False):
            raise ModmetaError(
                f"eval_shots={hparams['eval_shots']}: a {type(learner).__name__} needs images of every class; leave "
                f"out 0, or take a ZeroShotLearner"
            )
        if not hasattr(self, "store"):
            self.store = self._open_store()
        sides = split_store(
            self.store,
            {side: hparams[f"{side}_domains"] for side in ("train", "val", "test")},
            {side: hparams[f"{side}_classes"] for side in ("val", "test")},
            hparams["test_seen_classes"],
        )
        if stage == "test" and not sides["test"].domains:
            raise ModmetaError("there is nothing to test on; name test_domains or test_classes")
        self.train_domains, self.val_domains, self.test_domains = (side.domains for side in sides.values())
        pool, seed = sides["train"].pool(self.store), hparams["seed"]
        source_pool, train_pool = share_pool(pool, hparams["source_share"], seed)
        present = {name for by_class in train_pool.values() for name in by_class}
        self.classes = tuple(name for name in sides["train"].classes if name in present)
        self._source = SourceImages(
            self.store, source_pool, self.classes, hparams["batch_size"], seed, hparams["augment"]
        )
        self._draws = self._make_draws(sides, train_pool)
        if hparams["mix_domains"]:
            self.val_domains, self.test_domains = (MIXED,), (MIXED,) if self.test_domains else ()

    def episode(self, split: str, index: int) -> Episode:
        """Return an episode, the same one for the same seed, split and index.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            index: from 0; endless for training.

        Raises:
            ModmetaError: if the split is unknown or has no domains.
            IndexError: if validation or test has fewer episodes.
        """
        return self._draw(split)[index]

    def source_images(self, limit_per_class: int | None = None) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield the source share of the training domains in chunks of up to 256 images, domain by domain.

        Args:
            limit_per_class: at most so many images of a class in a domain, the first of a seeded
                order; None for all.

        Yields:
            The domain, images ``(n, 3, H, W)`` uint8, labels ``(n,)`` into ``classes``, ids ``(n,)``.
        """
        self._draw("train")
        yield from self._source.chunks(limit_per_class)

    def train_dataloader(self) -> EpisodeLoader:
        """Return the loader of source batches, as many epochs as the learner asks for, then of episodes."""
        learner = getattr(self.trainer, "lightning_module", None)
        rank, world = rank_and_world()
        sampler = TrainSampler(
            self.hparams["steps_per_epoch"],
            self.hparams["episodes_per_step"],
            getattr(learner, "source_epochs", 0),
            self.hparams["batch_size"],
            rank,
            world,
            self._steps_done,
        )
        dataset = EpisodeDataset(self._draw("train"), self._source)
        return EpisodeLoader(dataset, sampler, self.hparams["num_workers"])

    def _steps_done(self) -> int:
        fit = getattr(self.trainer, "fit_loop", None)
        return 0 if fit is None else int(fit.epoch_loop.batch_idx) + 1

    def val_dataloader(self) -> EpisodeLoader:
        """Return the loader of validation episodes, one at a time."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> EpisodeLoader:
        """Return the loader of test episodes, one at a time."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> EpisodeLoader:
        draw = self._draw(split)
        assert isinstance(draw, EvaluationEpisodes)
        sampler = EvaluationSampler(len(draw), *rank_and_world())
        return EpisodeLoader(EpisodeDataset(draw), sampler, self.hparams["num_workers"])

    def _draw(self, split: str) -> EpisodeDraw:
        if not self._draws:
            self.setup()
        if split not in ("train", "val", "test"):
            raise unknown("split", split, ("train", "val", "test"))
        if split not in self._draws:
            raise ModmetaError("there is nothing to test on; name test_domains or test_classes")
        return self._draws[split]

    def _open_store(self) -> ImageStore:
        hparams = self.hparams
        store: ImageStore
        if hparams["root"] == "digits":
            store = DigitsDomains(hparams["image_size"])
        else:
            self._refuse_unknown_domains(Path(hparams["root"]))
            folder = hparams["root"], hparams["image_size"], hparams["cache_dir"], hparams["strict_images"]
            store = DomainFolder(*folder)
        if hparams["own_classes"]:
            store = OwnClasses(store)
        return RotatedClasses(store) if hparams["rotations"] else store

    def _refuse_unknown_domains(self, root: Path) -> None:
        """Refuse domains that have no folder, before thousands of images are looked at."""
        for where in ("train_domains", "val_domains", "test_domains"):
            for name in self.hparams[where] or ():
                if root.is_dir() and not (root / name).is_dir():
                    raise unknown("domain", name, [each.name for each in root.iterdir() if each.is_dir()], where)

    def _make_draws(self, sides: dict[str, Side], train_pool: Pool) -> dict[str, EpisodeDraw]:
        hparams = self.hparams
        ways, shots = _range(hparams["ways"]), _range(hparams["shots"])
        assert shots is not None
        queries, seed, most = hparams["queries"], hparams["seed"], max(hparams["eval_shots"])
        held_out = tuple(hparams["held_out_shifts"])
        used = tuple(name for name in SHIFTS.names() if name not in held_out)
        mix = mix_pool if hparams["mix_domains"] else _as_it_is
        train_pool = mix(train_pool)
        check_pool("train", train_pool, ways, shots[1], queries)
        draws: dict[str, EpisodeDraw] = {
            "train": TrainingEpisodes(
                self.store, train_pool, ways, queries, used, hparams["shift_share"], seed, shots,
                augment=hparams["augment"],
            )
        }  # fmt: skip
        ways, queries = _range(hparams["eval_ways"]) or ways, hparams["eval_queries"] or queries
        for side in (sides["val"], sides["test"]):
            simulated = side.name == "val" and not hparams["val_domains"]
            same_images = side.classes == sides["train"].classes and side.domains == sides["train"].domains
            pool = train_pool if same_images else mix(side.pool(self.store))
            check_pool(side.name, pool, ways, most, queries)
            if pool:
                draws[side.name] = EvaluationEpisodes(
                    self.store, pool, ways, queries, held_out if simulated else (), 1.0, seed,
                    side.name, tuple(hparams["eval_shots"]), hparams[f"{side.name}_episodes"],
                )  # fmt: skip
        return draws

    def _check_numbers(self) -> None:
        hparams = self.hparams
        least = {
            "image_size": 8, "queries": 1, "episodes_per_step": 1, "steps_per_epoch": 1, "val_episodes": 1,
            "test_episodes": 1, "batch_size": 1, "num_workers": 0, "seed": 0,
        }  # fmt: skip
        if hparams["eval_queries"] is not None:
            least["eval_queries"] = 1
        for name, bound in least.items():
            if hparams[name] < bound:
                raise ModmetaError(f"{name}={hparams[name]} is too small; it must be {bound} or more")
        for name, bound in (("ways", 2), ("eval_ways", 2), ("shots", 1)):
            limits = _range(hparams[name])
            if limits is not None and not bound <= limits[0] <= limits[1]:
                raise ModmetaError(f"{name}={hparams[name]} is no range; give LOW <= HIGH, from {bound} up")
        if not hparams["eval_shots"] or min(hparams["eval_shots"]) < 0:
            raise ModmetaError(f"eval_shots={hparams['eval_shots']} must hold numbers from 1 up, or 0 for no images")
        if not 0 < hparams["source_share"] <= 1:
            raise ModmetaError(f"source_share={hparams['source_share']} must lie above 0 and not above 1")
        for name in ("shift_share", "augment"):
            if not 0 <= hparams[name] <= 1:
                raise ModmetaError(f"{name}={hparams[name]} must lie in 0..1")


def _as_it_is(pool: Pool) -> Pool:
    return pool


def _range(value: int | Sequence[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    low, high = (value, value) if isinstance(value, int) else value
    return low, high
