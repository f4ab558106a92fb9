import pickle
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch

from modmeta.data import DomainDataModule, SourceBatch
from modmeta.data.sampler import EvaluationSampler, SourceStep, TrainSampler
from modmeta.errors import ModmetaError


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_episodes_are_shared_without_overlap_or_loss(world: int) -> None:
    numbers = []
    for epoch in (1, 2):
        asked = []
        for rank in range(world):
            sampler = TrainSampler(5, 6, source_epochs=1, batch_size=6, rank=rank, world=world)
            sampler.set_epoch(epoch)
            asked.append(list(sampler))
            assert len(asked[-1]) == len(sampler) == 5
        for step in zip(*asked, strict=True):
            assert {len(share) for share in step} == {6 // world}
            numbers.append(sorted(index for share in step for index in share))
    assert numbers == [list(range(6 * step, 6 * step + 6)) for step in range(10)]


def test_source_epochs_come_first() -> None:
    sampler = TrainSampler(2, 2, source_epochs=2, batch_size=4, rank=1, world=2)
    asked = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        asked += list(sampler)
    assert asked == [*(SourceStep(step, 1, 2) for step in range(4)), [1], [3]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 10, 12])
def test_evaluation_is_shared_without_padding(world: int, count: int) -> None:
    samplers = [EvaluationSampler(count, rank, world) for rank in range(world)]
    shares = [[index for (index,) in sampler] for sampler in samplers]
    assert sorted(chain.from_iterable(shares)) == list(range(count))
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ModmetaError, match="episodes_per_step=4 cannot be shared by 3 devices"):
        TrainSampler(5, 4, rank=0, world=3)
    with pytest.raises(ModmetaError, match="batch_size=64 cannot be shared by 3 devices"):
        TrainSampler(5, 3, source_epochs=1, batch_size=64, rank=0, world=3)
    with pytest.raises(ModmetaError, match="2 episodes are too few for 3 devices"):
        EvaluationSampler(2, 0, 3)


def test_ranks_together_see_the_whole_source_batch() -> None:
    module = DomainDataModule(batch_size=12)
    module.setup()
    whole = module._source.batch(3)
    assert whole.images.shape == (12, 3, 32, 32)
    for world in (2, 3):
        shares = [module._source.batch(3, rank, world) for rank in range(world)]
        for name in ("images", "labels", "domains"):
            assert torch.equal(torch.stack([getattr(s, name) for s in shares], 1).flatten(0, 1), getattr(whole, name))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers: int) -> None:
    class Learner:
        source_epochs = 1

    class Trainer:
        lightning_module = Learner()

    module = DomainDataModule(num_workers=workers, steps_per_epoch=3, episodes_per_step=2, batch_size=8, queries=2)
    module.trainer = Trainer()  # type: ignore[assignment]
    module.setup()
    loader = module.train_dataloader()
    state = torch.get_rng_state()
    first = list(loader)
    loader.sampler.set_epoch(1)
    second = list(loader)
    loader._iterator = None  # ends the workers at once; the garbage collector would wait for seconds
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loader) == 3
    for step, batch in enumerate(first):
        assert isinstance(batch, SourceBatch)
        assert torch.equal(batch.images, module._source.batch(step).images)
    for step, episodes in enumerate(second):
        assert [episode.index for episode in episodes] == [2 * step, 2 * step + 1]
        for episode in episodes:
            assert torch.equal(episode.support, module.episode("train", episode.index).support)


@pytest.mark.filterwarnings("ignore:.*give a cache_dir")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_gives_one_line_from_any_process(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("modmeta.data.folders.MEMORY_LIMIT", 0)  # images are decoded when they are drawn
    root = make_folder(images=4)
    module = DomainDataModule(str(root), shots=2, eval_shots=[2], queries=2, num_workers=workers)
    module.setup()
    for path in root.rglob("2.png"):
        path.write_text("not an image")
    loader = module.train_dataloader()
    with pytest.raises(ModmetaError, match=r"2\.png is no image") as caught:
        list(loader)
    loader._iterator = None
    assert "\n" not in str(caught.value)


def test_what_a_spawned_worker_gets_draws_the_same(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = make_folder(images=4)
    cache = str(tmp_path / "cache")
    module = DomainDataModule(str(root), shots=1, eval_shots=[1], queries=2, cache_dir=cache)
    module.setup()
    dataset = module.train_dataloader().dataset
    (here,) = dataset[[5]]
    packed = pickle.dumps(dataset)
    for path in root.rglob("*.png"):
        path.unlink()  # only the cache has the pixels now
    (there,) = pickle.loads(packed)[[5]]
    assert torch.equal(here.support, there.support)
    assert torch.equal(here.query, there.query)
