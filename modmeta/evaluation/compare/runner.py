"""Runs every system on every frozen episode, as far as that was not done before."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import DivergedError, Support
from modmeta.data import Episode, ImageStore
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.evaluation.compare.manifest import Place
from modmeta.evaluation.compare.rows import Row, RowFile
from modmeta.evaluation.compare.settings import Comparison
from modmeta.evaluation.systems.system import System, Task
from modmeta.evaluation.terminal import console
from modmeta.learners import MetaLearner
from modmeta.learners.measuring import episode_support
from modmeta.learners.metrics import calibration_bins

_TIMED_IMAGES = 16
_TIMED_RUNS = 5


def run_comparison(
    comparison: Comparison,
    systems: Mapping[str, System],
    places: Sequence[Place],
    store: ImageStore,
    load: Callable[[str], MetaLearner],
    rows: RowFile,
) -> None:
    """Measure the rows that are missing, domain by domain and episode by episode.

    Args:
        comparison: the settings.
        systems: the systems, by their names in the settings.
        places: the frozen episodes.
        store: the images.
        load: from a domain to the learner to test there; called only where rows are missing.
        rows: what was measured before, and where new rows go.

    Raises:
        DivergedError: if a system's logits are not finite.
        ModmetaError: if a learner does not fit the data, or a system fails on its input.
    """
    missing = {
        place: [name for name in systems if (name, place.domain, place.shots, place.draw) not in rows.rows]
        for place in places
    }
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
                  console=console()) as progress:  # fmt: skip
        bar = progress.add_task("comparing", total=sum(map(len, missing.values())))
        for domain in dict.fromkeys(place.domain for place, names in missing.items() if names):
            mine = {place: names for place, names in missing.items() if place.domain == domain and names}
            progress.update(bar, description=domain)
            learner = load(domain)
            _check(learner, domain, comparison, store)
            learner.keep_features(store, comparison.data.get("cache_dir"))
            for name in systems:
                if any(name in names for names in mine.values()):
                    torch.manual_seed(comparison.seed)
                    systems[name].prepare(learner)
            forward = _forward_seconds(learner, store)
            for place, names in mine.items():
                other = another_place(place, places, comparison.domains)
                task = make_task(learner, place, store, comparison, other)
                for name in names:
                    rows.append(_measure(name, systems[name], task, place, comparison.seed, forward))
                    progress.advance(bar)


def make_task(
    learner: MetaLearner, place: Place, store: ImageStore, comparison: Comparison, other: Place | None = None
) -> Task:
    """Return the task of a frozen episode, its support spoiled as the settings ask for.

    Args:
        learner: what is tested.
        place: the episode.
        store: the images.
        comparison: the settings.
        other: an episode whose support serves a system that asks for another one.
    """

    def support_of(place: Place, episode: Episode) -> Support:
        support = episode_support(episode, hide=episode.domain in learner.sources.domains)
        if comparison.unlabelled:
            return dataclasses.replace(support, labels=None)
        if not comparison.flipped_labels:
            return support
        random = rng(comparison.seed, "flipped labels", place.domain, place.draw, place.shots)
        return with_wrong_labels(support, comparison.flipped_labels, random)

    def another() -> Support:
        assert other is not None
        return support_of(other, other.episode(store).to(learner.device))

    episode = place.episode(store).to(learner.device)
    return Task(learner, episode, support_of(place, episode), None if other is None else another)


def another_place(place: Place, places: Sequence[Place], domains: Sequence[str]) -> Place | None:
    """Return another episode with as many shots: the same draw of the next domain, or, with one domain, another draw.

    It stays the same when the number of episodes grows.
    """
    domain = domains[(domains.index(place.domain) + 1) % len(domains)]
    draw = place.draw if len(domains) > 1 else place.draw - 1 if place.draw else 1
    return next((p for p in places if (p.domain, p.shots, p.draw) == (domain, place.shots, draw)), None)


def with_wrong_labels(support: Support, share: float, random: np.random.Generator) -> Support:
    """Return a labelled support with exactly the rounded share of its labels wrong, at random."""
    order = random.permutation(len(support.images)).tolist()
    steps = random.integers(1, support.ways, len(support.images)).tolist()
    return flip_labels(support, share, order, steps)


def flip_labels(support: Support, share: float, order: Sequence[int], steps: Sequence[int]) -> Support:
    """Return a support with exactly the rounded share of its labels wrong.

    Args:
        support: the images, with labels.
        share: how many labels to turn, in 0..1.
        order: ``(S,)``, the images in the order in which their labels turn: a larger share turns the same and more.
        steps: ``(S,)``, by how many classes, from 1 to one less than there are.
    """
    assert support.labels is not None
    labels = support.labels.clone()
    for image in order[: round(share * len(labels))]:
        labels[image] = (labels[image] + steps[image]) % support.ways
    return dataclasses.replace(support, labels=labels)


def _measure(name: str, system: System, task: Task, place: Place, seed: int, forward: float) -> Row:
    where = f"system {name!r}, domain {place.domain!r}, {place.shots} shots, episode {place.draw}"
    learner, labels = task.learner, task.episode.query_labels
    # Features that systems share are computed outside of the time of whichever system asks first.
    _ = task.features
    task.forward_images = 0
    # Each row has its own random numbers, so that none depends on which rows were measured before it.
    draw = int(rng(seed, "system", place.domain, place.draw, place.shots).integers(2**62))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(draw)
        try:
            _wait(learner.device)
            begin = time.perf_counter()
            outcome = system.adapt(task)
            _wait(learner.device)
            seconds = time.perf_counter() - begin + forward * task.forward_images
            logits = outcome.classify(task).double()
        except ModmetaError as error:
            raise type(error)(f"{where}: {error}") from error
        except Exception as error:
            error.add_note(where)
            raise
    ways = len(place.classes)
    if logits.shape != (len(labels), ways):
        raise ModmetaError(f"{where}: logits {tuple(logits.shape)} where {(len(labels), ways)} are wanted")
    if not torch.isfinite(logits).all():
        raise DivergedError(f"{where}: its logits are not finite")
    return Row(
        system=name,
        domain=place.domain,
        shots=place.shots,
        draw=place.draw,
        ways=ways,
        accuracy=_accuracy(logits, labels),
        nll=float(F.cross_entropy(logits, labels)),
        parameters_updated=outcome.parameters / sum(p.numel() for p in learner.model.backbone.parameters()),
        backward_macs=int(outcome.backward_macs),
        seconds=seconds,
        bins=calibration_bins(logits.softmax(-1), labels).tolist(),
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


@torch.no_grad()
def _forward_seconds(learner: MetaLearner, store: ImageStore) -> float:
    """Return the time that one image takes in a batch through the frozen backbone, uncached."""
    images = store.load(range(min(_TIMED_IMAGES, len(store)))).to(learner.device)
    times = []
    for _ in range(1 + _TIMED_RUNS):  # the first one warms up
        _wait(learner.device)
        begin = time.perf_counter()
        learner.model.backbone(images)
        _wait(learner.device)
        times.append((time.perf_counter() - begin) / len(images))
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check(learner: MetaLearner, domain: str, comparison: Comparison, store: ImageStore) -> None:
    checkpoint, size = comparison.checkpoint(domain), learner.model.backbone.image_size
    if size != store.image_size:
        raise ModmetaError(f"checkpoint {checkpoint} is for images of {size} pixels; set data.image_size to that")
    if domain in learner.sources.domains and not comparison.data.get("test_classes"):
        raise ModmetaError(
            f"checkpoint {checkpoint} was trained on domain {domain!r}; give the one that it was held out of"
        )
