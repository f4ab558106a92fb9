"""Tiny learners of the gradient family, and the same network and tasks written by hand."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adapters import UnitConfig
from modmeta.data import DomainDataModule, Episode
from modmeta.learners import BackboneConfig, GradientLearner, ReptileLearner

FOUR_BLOCK = BackboneConfig("test_four_block", pretrained=False, image_size=28)
FULL = (UnitConfig("full", {"scaled": False}, group="site"),)
BODY = "full@*"

METHODS: dict[str, dict[str, Any]] = {
    "maml": {"steps": 2},
    "fomaml": {"steps": 2, "order": 1},
    "anil": {"steps": 2, "adapted": ["head"]},
    "boil": {"steps": 2, "adapted": [BODY]},
    "zero_maml": {"steps": 2, "head": "zero"},
    "proto_maml": {"steps": 2, "head": "prototype"},
    "meta_sgd": {"rule": "meta_sgd"},
    "maml_pp": {"steps": 2, "rule": "lslr", "multi_step_epochs": 2},
    "alfa": {"steps": 2, "rule": "alfa"},
}


def gradient(**changes: Any) -> GradientLearner:
    """Return a tiny gradient learner of the whole network."""
    torch.manual_seed(0)
    return GradientLearner(**({"backbone": FOUR_BLOCK, "units": FULL, "ways": 3} | changes))


def reptile(**changes: Any) -> ReptileLearner:
    """Return a tiny Reptile learner of the whole network."""
    torch.manual_seed(0)
    return ReptileLearner(**({"backbone": FOUR_BLOCK, "units": FULL, "ways": 3, "steps": 2, "test_steps": 3} | changes))


def data(**changes: Any) -> DomainDataModule:
    """Return digits for that network."""
    return tiny.digits(**({"image_size": 28} | changes))


def away(learner: GradientLearner | ReptileLearner) -> Any:
    """Return the learner in double precision and off its initial values, so that no gradient is zero by accident."""
    generator = torch.Generator().manual_seed(3)
    learner.double()
    with torch.no_grad():
        for parameter in learner.meta_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.double)
    return learner


def episodes(count: int = 2, ways: int = 3, size: int = 28) -> list[Episode]:
    """Return tasks of random pixels."""
    generator = torch.Generator().manual_seed(1)

    def pixels(number: int) -> Tensor:
        return torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)

    labels, none = torch.arange(ways), torch.zeros(0, dtype=torch.long)
    names = tuple(str(way) for way in range(ways))
    return [
        Episode(i, "ink", names, 2, pixels(2 * ways), labels.repeat_interleave(2), none,
                pixels(4 * ways), labels.repeat_interleave(4), none)
        for i in range(count)
    ]  # fmt: skip


Net = dict[str, Tensor]


def network(learner: GradientLearner | ReptileLearner) -> Net:
    """Return the learner's weights as the papers have them, by the names ``block.tensor`` and ``head.tensor``."""
    host = learner.model.backbone.tensors()
    net = {}
    for name, change in zip(learner.bank.names, learner.bank.prior, strict=True):
        _, site, tensor = name.split("|")
        net[f"{site}.{tensor}"] = (host[f"{site}.{tensor}"] + change).detach()
    if learner.linear is not None:
        net |= {"head.weight": learner.linear.weight.detach(), "head.bias": learner.linear.bias.detach()}
    return {name: tensor.clone().requires_grad_() for name, tensor in net.items()}


def features(net: Net, images: Tensor) -> Tensor:
    """The published network, with PyTorch's own batch normalisation."""
    x = images.double().div(255).mean(1, keepdim=True)
    for block in (f"blocks.{number}" for number in range(4)):
        x = F.conv2d(x, net[f"{block}.conv.weight"], padding=1)
        x = F.batch_norm(x, None, None, net[f"{block}.norm.weight"], net[f"{block}.norm.bias"], training=True)
        x = F.max_pool2d(F.relu(x), 2)
    return x.flatten(1)


def loss_of(net: Net, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the network with its head."""
    return F.cross_entropy(features(net, images) @ net["head.weight"].T + net["head.bias"], labels)
