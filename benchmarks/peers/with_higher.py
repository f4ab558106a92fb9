"""higher's inner loop; its first order is the known work-around, as ``track_higher_grads=False`` gives no gradient."""

from __future__ import annotations

import higher
import torch
from peers.ours import published
from peers.setting import Entry, Gradients, Setting, loss_of, mean_of

METHODS = ("maml", "fomaml")


def entry(setting: Setting) -> Entry:
    """Return higher's way to the meta-gradient of a method."""
    net, tasks = published(setting)
    own = dict(net.named_parameters())
    second_order = setting.method == "maml"

    def meta_gradient() -> Gradients:
        optimizer, found = torch.optim.SGD(net.parameters(), lr=setting.rate), []
        for task in tasks:
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False, track_higher_grads=second_order) as (
                copy,
                inner,
            ):
                for _ in range(setting.steps):
                    inner.step(loss_of(copy, task.support, task.support_labels))
                loss = loss_of(copy, task.query, task.query_labels)
                moved = own.values() if second_order else copy.parameters()
                found.append(torch.autograd.grad(loss, list(moved)))
        return mean_of(own, found)

    return meta_gradient
