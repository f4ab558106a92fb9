"""The contract of an execution backend: how the meta-gradient of a batch of tasks is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from modmeta.registry import Registry

Task = Mapping[str, Tensor]
TaskLoss = Callable[[Mapping[str, Tensor], Task], Tensor]


class Execution(ABC):
    """Turns the loss of one task into the meta-gradient of a batch of tasks.

    All backends compute the same numbers and differ in time and memory alone.

    Attributes:
        choice: what a backend has decided by itself and a resumed run has to abide by; None where nothing is decided.
    """

    choice: str | None = None

    @abstractmethod
    def meta_gradient(
        self, loss: TaskLoss, parameters: Mapping[str, Tensor], tasks: Sequence[Task]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each task and the gradient of their mean.

        Args:
            loss: maps (parameters, task) to the scalar query loss after adaptation. A pure function of
                its tensors; the inner gradients that it takes itself (``torch.autograd.grad`` with
                ``create_graph``, or ``torch.func.grad``) are differentiated through.
            parameters: by name, the tensors to differentiate with respect to; left as they are.
            tasks: one or more; each holds ``support`` ``(S, C, H, W)``, ``support_labels`` ``(S,)``, ``query``
                ``(Q, C, H, W)`` and ``query_labels`` ``(Q,)``, or whatever else ``loss`` reads.

        Returns:
            Losses ``(N,)`` and, by name, gradients of their mean, shaped as the parameters; zero where the
            loss does not depend on one. Neither carries a graph.
        """


def signature(tensors: Mapping[str, Tensor]) -> tuple[object, ...]:
    """Return what a kernel is specialised on: name, shape, type and device of each tensor."""
    return tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items())


EXECUTIONS: Registry[type[Execution]] = Registry("execution")
