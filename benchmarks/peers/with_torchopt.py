"""TorchOpt's differentiable optimiser; it has no first order."""

from __future__ import annotations

import torch
import torchopt
from peers.ours import published
from peers.setting import Entry, Gradients, Setting, loss_of, mean_of

METHODS = ("maml",)


def entry(setting: Setting) -> Entry:
    """Return TorchOpt's way to the meta-gradient of MAML, one backward per task."""
    net, tasks = published(setting)
    own = dict(net.named_parameters())

    def meta_gradient() -> Gradients:
        inner, found = torchopt.MetaSGD(net, lr=setting.rate), []
        state = [torchopt.extract_state_dict(part, by="reference") for part in (net, inner)]
        for task in tasks:
            for _ in range(setting.steps):
                inner.step(loss_of(net, task.support, task.support_labels))
            loss = loss_of(net, task.query, task.query_labels)
            found.append(torch.autograd.grad(loss, list(own.values())))
            for part, kept in zip((net, inner), state, strict=True):
                torchopt.recover_state_dict(part, kept)
        return mean_of(own, found)

    return meta_gradient
