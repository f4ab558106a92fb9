"""learn2learn's algorithms, used as its examples use them."""

from __future__ import annotations

from copy import deepcopy

import learn2learn
import torch
from learn2learn.nn import PrototypicalClassifier
from peers.ours import published
from peers.setting import Entry, Gradients, Setting, loss_of, mean_of
from torch.nn import functional as F

METHODS = ("maml", "fomaml", "anil", "reptile", "meta_sgd", "protonet")


def entry(setting: Setting) -> Entry:
    """Return learn2learn's way to the meta-gradient of a method."""
    net, tasks = published(setting)
    own = dict(net.named_parameters())

    def adapted() -> Gradients:
        if setting.method == "meta_sgd":
            wrapped = learn2learn.algorithms.MetaSGD(net, lr=setting.rate)
        else:
            wrapped = learn2learn.algorithms.MAML(net, lr=setting.rate, first_order=setting.method == "fomaml")
        found = []
        for task in tasks:
            copy = wrapped.clone()
            for _ in range(setting.steps):
                copy.adapt(loss_of(copy, task.support, task.support_labels))
            loss = loss_of(copy, task.query, task.query_labels)
            found.append(torch.autograd.grad(loss, list(own.values())))
        return mean_of(own, found)

    def anil() -> Gradients:
        head, found = learn2learn.algorithms.MAML(net.head, lr=setting.rate), []
        for task in tasks:
            copy, support, query = head.clone(), net.body(task.support), net.body(task.query)
            for _ in range(setting.steps):
                copy.adapt(F.cross_entropy(copy(support), task.support_labels))
            loss = F.cross_entropy(copy(query), task.query_labels)
            found.append(torch.autograd.grad(loss, list(own.values())))
        return mean_of(own, found)

    def reptile() -> Gradients:
        found = []
        for task in tasks:
            assert task.batches is not None
            images, labels = torch.cat([task.support, task.query]), torch.cat([task.support_labels, task.query_labels])
            copy = deepcopy(net)
            optimizer = torch.optim.SGD(copy.parameters(), lr=setting.rate)
            for batch in task.batches:
                optimizer.zero_grad()
                loss_of(copy, images[batch], labels[batch]).backward()
                optimizer.step()
            found.append(tuple(a.detach() - b.detach() for a, b in zip(own.values(), copy.parameters(), strict=True)))
        return mean_of(own, found)

    def protonet() -> Gradients:
        body, found = {name: p for name, p in own.items() if name.startswith("body")}, []
        for task in tasks:
            head = PrototypicalClassifier(net.body(task.support), task.support_labels)
            loss = F.cross_entropy(head(net.body(task.query)), task.query_labels)
            found.append(torch.autograd.grad(loss, list(body.values())))
        return mean_of(body, found)

    return {"anil": anil, "reptile": reptile, "protonet": protonet}.get(setting.method, adapted)
