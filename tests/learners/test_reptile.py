"""Reptile against its formula, and what it refuses."""

from typing import Any

import family
import pytest
import torch
from family import loss_of
from torch import Tensor
from torch.func import grad, vmap

from modmeta.data import Episode
from modmeta.errors import ModmetaError
from modmeta.learners import ReptileLearner
from modmeta.learners.measuring import episode_support


def by_hand(learner: ReptileLearner, episode: Episode, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the network before and after training on all images of an episode with PyTorch's own optimiser."""
    net = family.network(learner)
    before = {name: tensor.detach().clone() for name, tensor in net.items()}
    parameters = list(net.values())
    # RMSprop's epsilon and bias differ from Adam's, so Adam it is, with beta1 = 0.
    optimizer = (
        torch.optim.SGD(parameters, lr=learner.rate)
        if kind == "sgd"
        else torch.optim.Adam(parameters, lr=learner.rate, betas=(0.0, 0.999))
    )
    images = torch.cat([episode.support, episode.query])
    labels = torch.cat([episode.support_labels, episode.query_labels])
    for chosen in learner.task(episode)["batches"]:
        optimizer.zero_grad()
        loss_of(net, images[chosen], labels[chosen]).backward()
        optimizer.step()
    return before, {name: tensor.detach() for name, tensor in net.items()}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_the_initial_values_move_towards_the_mean_of_the_results(kind: str, batch_size: int | None) -> None:
    learner = family.away(family.reptile(optimizer=kind, batch_size=batch_size, steps=3, rate=0.02, outer_rate=0.5))
    episodes = family.episodes(3)
    ends = [by_hand(learner, episode, kind) for episode in episodes]
    expected = {name: w + 0.5 * torch.stack([after[name] - w for _, after in ends]).mean(0)
                for name, w in ends[0][0].items()}  # fmt: skip
    parameters = learner.meta_parameters()
    (optimizer,) = learner.configure_optimizers()
    _, gradients = learner.meta_gradient(episodes, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for name, tensor in family.network(learner).items():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=1e-10, atol=1e-10, msg=name)
        assert not torch.equal(expected[name], ends[0][0][name])


def test_a_head_from_zero_is_not_learned_and_moves_the_rest_as_a_linear_one_of_zeros_does() -> None:
    zero = family.away(family.reptile(head="zero"))
    linear = family.away(family.reptile())
    linear.load_state_dict(zero.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in linear.linear.parameters():
            parameter.zero_()
    assert "linear.weight" not in zero.parameters_by_name()
    episodes = family.episodes()
    (_, found), (_, expected) = (each.meta_gradient(episodes, each.meta_parameters()) for each in (zero, linear))
    by_name = dict(zip(linear.parameters_by_name(), expected, strict=True))
    for name, gradient in zip(zero.parameters_by_name(), found, strict=True):
        torch.testing.assert_close(gradient, by_name[name], rtol=1e-10, atol=1e-12, msg=name)
        assert bool(gradient.any())
    five = family.episodes(1, ways=5)[0]
    with torch.no_grad():
        assert zero.logits(zero.adapt(episode_support(five, hide=False)), five.query).shape[1] == 5


def test_the_move_can_be_batched_over_tasks() -> None:
    learner = family.away(family.reptile())
    values = {name: parameter.detach() for name, parameter in learner.parameters_by_name().items()}
    tasks = [learner.task(episode) for episode in family.episodes()]
    batched = vmap(grad(learner.task_loss), in_dims=(None, 0))(
        values, {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}
    )
    for row, task in enumerate(tasks):
        for name, gradient in grad(learner.task_loss)(values, task).items():
            torch.testing.assert_close(batched[name][row], gradient, rtol=1e-10, atol=1e-10)


def test_batches_deal_out_every_image_before_any_comes_again() -> None:
    learner = family.reptile(batch_size=6, steps=5)
    one, other = (learner.task(episode)["batches"] for episode in family.episodes())
    assert one.shape == (5, 6)  # of 18 images
    assert sorted(one[:3].flatten().tolist()) == list(range(18))
    assert not torch.equal(one, other)
    assert torch.equal(one, learner.task(family.episodes()[0])["batches"])
    support = episode_support(family.episodes()[0], hide=False)
    assert learner.support_task(support)["batches"].shape == (3, 6)
    assert torch.equal(family.reptile(batch_size=100).support_task(support)["batches"].sort(1).values,
                       torch.arange(6).expand(3, 6))  # fmt: skip


def test_what_does_not_move_is_not_learned() -> None:
    learner = family.reptile(adapted=["head"])
    _, gradients = learner.meta_gradient(family.episodes(), learner.meta_parameters())
    moved = {name for name, g in zip(learner.parameters_by_name(), gradients, strict=True) if bool(g.any())}
    assert moved == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optimizer": "adamw"}, "did you mean 'adam'"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"outer_rate": 1.5}, "outer_rate must lie in"),
        ({"rate": -1.0}, "rate must be finite and above 0"),
        ({"head": "zero", "adapted": ["full@*"]}, "adapt head, too"),
        ({"head": "ridge"}, "head to start from"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ModmetaError, match=line):
        family.reptile(**changes)
