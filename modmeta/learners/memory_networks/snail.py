"""SNAIL-style: causal convolutions and attention over the sequence of labelled images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.learners.memory_networks.network import MemoryNetwork, Recall, register_memory_network


@register_memory_network("snail")
class SNAILMemory(MemoryNetwork):
    """Attention, temporal convolutions and attention again, over images that come with their labels.

    Mishra et al., "A Simple Neural Attentive Meta-Learner", ICLR 2018. A query comes last, without a label, and looks
    back at the whole support.

    Args:
        width: numbers per image.
        ways: number of label codes.
        hidden: width of keys and values, and of what each convolution adds.
        dilations: number of convolutions; each looks twice as far back as the one before.
    """

    def __init__(self, width: int, ways: int, hidden: int = 32, dilations: int = 5) -> None:
        super().__init__(width, ways)
        first = width + ways
        self.first = _Attention(first, hidden)
        self.convolutions = nn.ModuleList(
            _Convolution(first + hidden * (1 + step), hidden, 2**step) for step in range(dilations)
        )
        last = first + hidden * (1 + dilations)
        self.second = _Attention(last, hidden)
        self.output = nn.Linear(last + hidden, ways)

    def read(self, features: Tensor, codes: Tensor) -> Recall:
        """Keep the support; it is looked at anew for every query."""
        support = torch.cat([features, codes], dim=-1)

        def recall(queries: Tensor) -> Tensor:
            last = F.pad(queries, (0, self.ways)).flatten(0, 1)
            x = torch.cat([support.repeat_interleave(queries.shape[1], 0), last[:, None]], dim=1)
            x = self.first(x)
            for convolution in self.convolutions:
                x = convolution(x)
            logits: Tensor = self.output(self.second(x)[:, -1]).unflatten(0, queries.shape[:2])
            return logits

        return recall


class _Attention(nn.Module):
    """Appends what a position finds at itself and at earlier ones; ``(B, T, C)`` to ``(B, T, C + hidden)``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.maps = nn.Linear(width, 3 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        query, key, value = self.maps(x).chunk(3, dim=-1)
        return torch.cat([x, F.scaled_dot_product_attention(query, key, value, is_causal=True)], dim=-1)


class _Convolution(nn.Module):
    """Appends a gated convolution with the position ``dilation`` steps back."""

    def __init__(self, width: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.maps = nn.Linear(2 * width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        earlier = F.pad(x, (0, 0, self.dilation, 0))[:, : x.shape[1]]
        change, gate = self.maps(torch.cat([x, earlier], dim=-1)).chunk(2, dim=-1)
        return torch.cat([x, change.tanh() * gate.sigmoid()], dim=-1)
