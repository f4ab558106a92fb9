"""One task after the other through autograd: the plain reference, and the least memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modmeta.adaptation.execution.base import EXECUTIONS, Execution, Task, TaskLoss


@EXECUTIONS.register("loop")
class Loop(Execution):
    """Runs any loss on any device; the graph of one task is freed before the next one is built."""

    def meta_gradient(
        self, loss: TaskLoss, parameters: Mapping[str, Tensor], tasks: Sequence[Task]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Execution.meta_gradient`."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        losses = []
        for task in tasks:
            with torch.enable_grad():
                value = loss(leaves, task)
                gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
            losses.append(value.detach())
            for mean, gradient in zip(total.values(), gradients, strict=True):
                mean.add_(gradient, alpha=1 / len(tasks))
        return torch.stack(losses), total
