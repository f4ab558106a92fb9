"""Memory learners: what they learn, what they are indifferent to, and what they refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from textbook import assert_resumes, same, support_of, tensors
from torch.nn import functional as F

from modmeta.adapters import UnitConfig
from modmeta.errors import ModmetaError
from modmeta.learners import MemoryLearner, load_learner
from modmeta.learners.memory_networks import MEMORY_NETWORKS, MemoryNetwork

NETWORKS = {"lstm": {"hidden": 24}, "mann": {"hidden": 24, "slots": 8, "word": 8}, "snail": {"hidden": 8}}


def memory(network: str, **changes: Any) -> MemoryLearner:
    """Return a tiny memory learner of three label codes."""
    options: dict[str, Any] = {
        "backbone": tiny.BACKBONE, "network": network, "ways": 3, "embedding": 8,
        "network_options": NETWORKS[network], "source_images": 3, "learning_rate": 1e-2,
    }  # fmt: skip
    torch.manual_seed(0)
    return MemoryLearner(**(options | changes))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_learns_to_bind_labels_to_images(name: str) -> None:
    """Two images and two labels, paired anew in every episode: only the support tells which is which."""
    torch.manual_seed(0)
    network: MemoryNetwork = MEMORY_NETWORKS.make(name, 2, 2, **NETWORKS[name])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    images, codes = torch.eye(2) * 2 - 1, torch.eye(2)

    def losses() -> torch.Tensor:
        found = []
        for order in ([0, 1], [1, 0]):
            for swapped in ([0, 1], [1, 0]):
                labels = torch.tensor(swapped)
                recall = network.read(images[order][None], codes[labels[order]][None])
                found.append(F.cross_entropy(recall(images[None])[0], labels))
        return torch.stack(found)

    before = float(losses().detach().mean())
    for _ in range(150):
        optimizer.zero_grad()
        losses().mean().backward()
        optimizer.step()
    assert before > 0.6  # a guess costs 0.69
    assert float(losses().detach().max()) < 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_queries_know_nothing_of_each_other(name: str) -> None:
    learner = memory(name).double()
    support, query, _ = support_of(tiny.digits())
    with torch.no_grad():
        adapted = learner.adapt(support)
        together = learner.logits(adapted, query)
        alone = torch.cat([learner.logits(adapted, image[None]) for image in query])
        assert torch.equal(together, learner.logits(adapted, query))  # and asking changes no memory
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_it_says_depends_on_the_labels_of_the_support(name: str) -> None:
    learner = memory(name)
    support, query, _ = support_of(tiny.digits())
    with torch.no_grad():
        before = learner.logits(learner.adapt(support), query)
        turned = learner.logits(learner.adapt(replace(support, labels=support.labels.roll(2))), query)
    assert before.shape == (len(query), 3)
    assert not torch.allclose(before, turned)


def test_training_shows_the_support_in_an_order_and_with_codes_of_the_episode() -> None:
    learner = memory("lstm")
    seen = []
    learner.memory.read = lambda features, codes: seen.append((features[0], codes[0])) or (lambda q: q[..., :3])  # type: ignore
    data = tiny.digits(shots=3)
    data.setup()
    episode = data.episode("train", 0)
    for index in (0, 0, 1, 2, 3):
        learner.episode_loss(replace(episode, index=index))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    orders = {tuple(codes.argmax(1).tolist()) for _, codes in seen}
    assert len(orders) == 4
    for _, codes in seen:
        assert codes.sum(0).tolist() == [3, 3, 3]


@pytest.mark.parametrize("name", NETWORKS)
def test_episodes_read_side_by_side_lose_as_much_as_one_by_one(name: str) -> None:
    learner = memory(name, readings=2).double()
    data = tiny.digits(shots=(1, 3))
    data.setup()
    episodes = [data.episode("train", index) for index in range(4)]
    assert len({episode.shots for episode in episodes}) > 1
    parameters = learner.meta_parameters()
    loss, gradients = learner.meta_gradient(episodes, parameters)
    alone = torch.stack([learner.episode_loss(episode) for episode in episodes]).mean()
    torch.testing.assert_close(loss, alone.detach())
    for one, other in zip(gradients, torch.autograd.grad(alone, parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_readings_are_sequences_of_their_own() -> None:
    data = tiny.digits(shots=3)
    data.setup()
    episode = data.episode("train", 0)
    assert not torch.equal(memory("lstm").episode_loss(episode), memory("lstm", readings=2).episode_loss(episode))


def test_fewer_classes_than_codes_give_as_many_logits() -> None:
    learner = memory("snail", ways=5)
    support, query, _ = support_of(tiny.digits())
    assert learner.logits(learner.adapt(support), query).shape == (len(query), 3)


def test_it_trains_the_embedding_with_units_and_nothing_of_the_backbone_without(tmp_path: Path) -> None:
    for units, parts in (((), {"memory", "embedding"}), ((UnitConfig("film"),), {"memory", "embedding", "bank"})):
        learner = memory("lstm", units=units)
        before = tensors(learner)
        tiny.trainer(tmp_path, 1).fit(learner, datamodule=tiny.digits())
        moved = {name.split(".")[0] for name, t in tensors(learner).items() if not torch.equal(t, before[name])}
        assert moved == parts


def test_a_fit_that_is_resumed_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    assert_resumes(lambda: memory("mann"), tiny.digits, tmp_path)


def test_a_checkpoint_brings_back_learner_and_network(tmp_path: Path) -> None:
    learner = memory("snail")
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(learner, datamodule=tiny.digits())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_learner(tmp_path / "last.ckpt")
    assert type(again) is MemoryLearner
    assert same(tensors(again), tensors(learner))


def test_the_memory_is_no_adapter_file() -> None:
    support, _, _ = support_of(tiny.digits())
    with torch.no_grad(), pytest.raises(ModmetaError, match="which Remembered is not"):
        memory("lstm").adapt(support).to_file({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "label codes for 2 or more"),
        ({"embedding": 0}, "embedding must be above 0"),
        ({"network_options": {"hiden": 3}}, "did you mean 'hidden'"),
        ({"network_options": {"hidden": 0}}, "hidden must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModmetaError, match=message):
        memory("lstm", **options)
    with pytest.raises(ModmetaError, match="unknown memory network 'gru'"):
        MEMORY_NETWORKS.make("gru", 3, 3)


def test_supports_that_it_cannot_read_are_refused() -> None:
    support, _, _ = support_of(tiny.digits())
    with pytest.raises(ModmetaError, match="has 3 classes, and this memory learner codes for 2"):
        memory("lstm", ways=2).adapt(support)
    with pytest.raises(ModmetaError, match="sort the support into classes"):
        memory("lstm").adapt(replace(support, labels=None))
