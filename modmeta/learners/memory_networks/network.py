"""The contract of a memory network: it reads labelled features one after another, and then answers queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from modmeta.registry import Registry

MEMORY_NETWORKS: Registry[Callable[..., MemoryNetwork]] = Registry("memory network")
register_memory_network = MEMORY_NETWORKS.register

Recall = Callable[[Tensor], Tensor]
"""From query features ``(N, Q, D)`` to logits ``(N, Q, ways)``, each query alone after its episode's support."""


class MemoryNetwork(nn.Module, ABC):
    """Base of the memory networks; a subclass implements :meth:`read`.

    Args:
        width: numbers per image ``D``.
        ways: number of label codes.
    """

    def __init__(self, width: int, ways: int) -> None:
        super().__init__()
        self.width = width
        self.ways = ways

    @abstractmethod
    def read(self, features: Tensor, codes: Tensor) -> Recall:
        """Read the support sets of some episodes, each in the order in which it comes.

        Args:
            features: ``(N, S, D)``, embedded.
            codes: ``(N, S, ways)``, one-hot labels.
        """
