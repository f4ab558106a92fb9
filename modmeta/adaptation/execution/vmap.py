"""Many tasks in each kernel: the gradient of one task, vectorised over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modmeta.adaptation.execution.base import EXECUTIONS, Execution, Task, TaskLoss, signature
from modmeta.errors import ModmetaError


@EXECUTIONS.register("vmap")
class Vmap(Execution):
    """Takes the gradient inside ``torch.func.vmap``, chunk by chunk; for GPUs, and on a CPU for small tensors.

    The order is ``vmap(grad(loss))``. The other one, ``grad(vmap(loss))``, would hold the graphs of all tasks at once,
    chunked or not, and is wrong where a batching rule lacks its second derivative (PyTorch's train-mode batch norm).
    A loss may use neither that nor data-dependent control flow. Tasks of different shapes run in separate chunks.

    Attributes:
        chunk: most tasks that are in memory at once. None takes them all.
    """

    def __init__(self, chunk: int | None = None) -> None:
        if chunk is not None and chunk < 1:
            raise ModmetaError(f"the chunk of execution 'vmap' is {chunk}; it needs one task or more")
        self.chunk = chunk

    def meta_gradient(
        self, loss: TaskLoss, parameters: Mapping[str, Tensor], tasks: Sequence[Task]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Execution.meta_gradient`.

        Raises:
            ModmetaError: if ``loss`` does what ``torch.func.vmap`` cannot vectorise.
        """
        fixed = {name: tensor.detach() for name, tensor in parameters.items()}
        total = {name: torch.zeros_like(tensor) for name, tensor in fixed.items()}
        losses: dict[int, Tensor] = {}
        vectorised = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0), randomness="different")
        for places in self._chunks(tasks):
            stacked = {name: torch.stack([tasks[place][name] for place in places]) for name in tasks[places[0]]}
            try:
                gradients, values = vectorised(fixed, stacked)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                raise ModmetaError(
                    f"the loss cannot be vectorised over tasks ({reason}); use execution 'loop'"
                ) from error
            losses.update(zip(places, values.detach().unbind(), strict=True))
            for name, gradient in gradients.items():
                total[name].add_(gradient.sum(0), alpha=1 / len(tasks))
        return torch.stack([losses[place] for place in range(len(tasks))]), total

    def _chunks(self, tasks: Sequence[Task]) -> list[list[int]]:
        alike: dict[object, list[int]] = {}
        for place, task in enumerate(tasks):
            alike.setdefault(signature(task), []).append(place)
        size = self.chunk or len(tasks)
        return [places[start : start + size] for places in alike.values() for start in range(0, len(places), size)]
