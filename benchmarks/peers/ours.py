"""modmeta's learners, through the method that their training step calls."""

from __future__ import annotations

from typing import Any

import torch
from peers.setting import Entry, Gradients, Published, Setting, Task
from torch import Tensor

from modmeta.adapters import UnitConfig
from modmeta.learners import BackboneConfig, GradientLearner, MetricLearner, ReptileLearner

NAMES = {64: "four_block", 4: "test_four_block"}
PARTS: dict[str, dict[str, Any]] = {
    "maml": {}, "fomaml": {"order": 1}, "anil": {"adapted": ["head"]}, "meta_sgd": {"rule": "meta_sgd"},
}  # fmt: skip
Learner = GradientLearner | ReptileLearner | MetricLearner


def learner_of(setting: Setting, execution: str = "loop", options: dict[str, Any] | None = None) -> Learner:
    """Return the learner of a method, with all weights of the network free."""
    torch.manual_seed(setting.seed)
    learner: Learner
    units = (UnitConfig("full", {"scaled": False}, group="site"),)
    backbone = BackboneConfig(NAMES[setting.width], pretrained=False, image_size=28)
    shared: dict[str, Any] = {"backbone": backbone, "units": units}
    if setting.method == "protonet":
        learner = MetricLearner(**shared)
    else:
        shared |= {"ways": setting.ways, "rate": setting.rate, "steps": setting.steps, "execution": execution,
                   "execution_options": options}  # fmt: skip
        if setting.method == "reptile":
            learner = ReptileLearner(**shared, optimizer="sgd", batch_size=setting.ways * setting.shots)
        else:
            learner = GradientLearner(**shared, **PARTS[setting.method])
    return learner.double() if setting.double else learner


def entry(setting: Setting, execution: str, options: dict[str, Any] | None = None) -> Entry:
    """Return the entry of one execution backend; ProtoNet has no inner loop and so no choice of one."""
    learner, episodes = learner_of(setting, execution, options), setting.episodes()
    parameters = learner.meta_parameters()
    names = {id(parameter): name for name, parameter in learner.named_parameters()}
    published = published_names(learner)

    def meta_gradient() -> Gradients:
        _, gradients = learner.meta_gradient(episodes, parameters)
        found = {names[id(p)]: gradient for p, gradient in zip(parameters, gradients, strict=True)}
        return {published[name]: gradient for name, gradient in found.items() if name in published}

    return meta_gradient


def published_names(learner: Learner) -> dict[str, str]:
    """Return, by parameter of the learner, the parameter of :class:`Published`."""
    parts = {"conv": 0, "norm": 1}
    names = {}
    for row, name in enumerate(learner.bank.names):
        _, site, tensor = name.split("|")
        _, block, part = site.split(".")
        names[f"bank.prior.{row}"] = f"body.{block}.{parts[part]}.{tensor}"
    if getattr(learner, "linear", None) is not None:
        names |= {"linear.weight": "head.weight", "linear.bias": "head.bias"}
    return names


def published(setting: Setting) -> tuple[Published, list[Task]]:
    """Return a copy of the learner's network and tasks for the peers."""
    learner = learner_of(setting)
    net = Published(setting.width, setting.ways)
    host, dtype = learner.model.backbone.tensors(), torch.double if setting.double else torch.float
    state: dict[str, Tensor] = dict(net.state_dict())
    names = published_names(learner)
    for row, name in enumerate(learner.bank.names):
        _, site, tensor = name.split("|")
        state[names[f"bank.prior.{row}"]] = host[f"{site}.{tensor}"] + learner.bank.prior[row].detach()
    if not isinstance(learner, MetricLearner) and learner.linear is not None:
        state |= {"head.weight": learner.linear.weight.detach(), "head.bias": learner.linear.bias.detach()}
    net.load_state_dict(state)
    tasks = []
    for episode in setting.episodes():
        support, query = (images[:, :1].to(dtype) / 255 for images in (episode.support, episode.query))
        labels = episode.support_labels, episode.query_labels
        batches = learner.task(episode)["batches"] if isinstance(learner, ReptileLearner) else None
        tasks.append(Task(support, labels[0], query, labels[1], batches))
    return net.to(dtype), tasks
