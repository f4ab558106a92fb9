"""An LSTM over images and the labels of the images before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modmeta.learners.memory_networks.network import MemoryNetwork, Recall, register_memory_network


@register_memory_network("lstm")
class LSTMMemory(MemoryNetwork):
    """Learns in its hidden state: at every step it sees an image and the label of the image before.

    Hochreiter, Younger and Conwell, "Learning to Learn Using Gradient Descent", ICANN 2001.

    Args:
        width: numbers per image.
        ways: number of label codes.
        hidden: size of the hidden state.
    """

    def __init__(self, width: int, ways: int, hidden: int = 128) -> None:
        super().__init__(width, ways)
        self.cell = nn.LSTM(width + ways, hidden, batch_first=True)
        self.output = nn.Linear(hidden, ways)

    def read(self, features: Tensor, codes: Tensor) -> Recall:
        """Run over the support, each image with the label of the one before."""
        before = torch.cat([torch.zeros_like(codes[:, :1]), codes[:, :-1]], dim=1)
        _, (h, c) = self.cell(torch.cat([features, before], dim=-1))

        def recall(queries: Tensor) -> Tensor:
            count = queries.shape[1]
            x = torch.cat([queries, codes[:, -1:].expand(-1, count, -1)], dim=-1)
            state = h.repeat_interleave(count, 1), c.repeat_interleave(count, 1)
            y, _ = self.cell(x.flatten(0, 1)[:, None], state)
            logits: Tensor = self.output(y[:, 0]).unflatten(0, queries.shape[:2])
            return logits

        return recall
