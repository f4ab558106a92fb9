"""A memory-augmented network: a controller with an external memory that is addressed by content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.errors import refuse_outside
from modmeta.learners.memory_networks.network import MemoryNetwork, Recall, register_memory_network


@dataclass(frozen=True)
class _Memory:
    """What is carried from step to step, for ``B`` sequences at once.

    Attributes:
        h: ``(B, H)`` of the controller; ``c`` likewise.
        slots: ``(B, N, W)``, the external memory.
        read: ``(B, R, N)`` weights of the last read.
        usage: ``(B, N)``, how much and how lately each slot was read or written.
        words: ``(B, R * W)``, what was read last.
    """

    h: Tensor
    c: Tensor
    slots: Tensor
    read: Tensor
    usage: Tensor
    words: Tensor

    def repeated(self, count: int) -> _Memory:
        """Return ``count`` copies of each sequence's memory, to go on from independently."""
        return _Memory(**{name: t.repeat_interleave(count, 0) for name, t in vars(self).items()})


@register_memory_network("mann")
class MANNMemory(MemoryNetwork):
    """Writes what it sees to the least recently used slots, or to those just read, and reads by content.

    Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", ICML 2016, with three changes. There every
    image is a question first, and its label comes a step later; here questions come after the support, so an image
    comes with its own label, and a question with none. Keys see image and label directly, not through the controller
    alone, so like images have like keys before anything is learned. Reads have a learned sharpness (Graves, Wayne and
    Danihelka, "Neural Turing Machines", 2014): cosine similarities lie within -1..1, and their softmax alone would be
    almost flat.

    Args:
        width: numbers per image.
        ways: number of label codes.
        hidden: size of the controller's state.
        slots: number of slots in the memory.
        word: numbers per slot.
        reads: places read and written per step.
        decay: share of the usage that is left after a step, 0 to 1.
    """

    def __init__(
        self,
        width: int,
        ways: int,
        hidden: int = 128,
        slots: int = 64,
        word: int = 40,
        reads: int = 2,
        decay: float = 0.95,
    ) -> None:
        super().__init__(width, ways)
        refuse_outside({"decay": decay}, 0, 1)
        self.slots, self.word, self.reads, self.decay = slots, word, reads, decay
        self.controller = nn.LSTMCell(width + ways + reads * word, hidden)
        self.keys = nn.Linear(hidden + width + ways, reads * word)
        self.sharpness = nn.Linear(hidden, reads)
        nn.init.constant_(self.sharpness.bias, 8.0)
        self.gates = nn.Linear(hidden, reads)
        self.output = nn.Linear(hidden + reads * word, ways)

    def read(self, features: Tensor, codes: Tensor) -> Recall:
        """Write the support to the memory."""
        memory = self._empty(features)
        for x in torch.cat([features, codes], dim=-1).unbind(1):
            memory = self._step(x, memory)

        def recall(queries: Tensor) -> Tensor:
            count = queries.shape[1]
            x = F.pad(queries, (0, self.ways)).flatten(0, 1)
            after = self._step(x, memory.repeated(count))
            logits: Tensor = self.output(torch.cat([after.h, after.words], dim=-1))
            return logits.unflatten(0, queries.shape[:2])

        return recall

    def _empty(self, like: Tensor) -> _Memory:
        count, hidden = len(like), self.controller.hidden_size
        zeros = like.new_zeros
        return _Memory(
            h=zeros(count, hidden),
            c=zeros(count, hidden),
            slots=zeros(count, self.slots, self.word) + 1e-3,  # the cosine with a zero slot has no slope
            read=zeros(count, self.reads, self.slots),
            usage=zeros(count, self.slots),
            words=zeros(count, self.reads * self.word),
        )

    def _step(self, x: Tensor, memory: _Memory) -> _Memory:
        h, c = self.controller(torch.cat([x, memory.words], dim=-1), (memory.h, memory.c))
        keys = self.keys(torch.cat([h, x], dim=-1)).tanh().unflatten(-1, (self.reads, self.word))
        # As many slots as there are keys are free to be written; the first of them forgets what it held.
        order = memory.usage.detach().argsort(dim=-1, stable=True)[:, : self.reads]
        unused = F.one_hot(order, self.slots).to(x.dtype)
        gate = self.gates(h).sigmoid()[..., None]
        write = gate * memory.read + (1 - gate) * unused
        slots = memory.slots * (1 - unused[:, 0])[..., None] + write.transpose(1, 2) @ keys
        likeness = F.cosine_similarity(keys[:, :, None], slots[:, None], dim=-1)
        read = (likeness * (1 + F.softplus(self.sharpness(h)))[..., None]).softmax(-1)
        usage = self.decay * memory.usage + read.sum(1) + write.sum(1)
        return _Memory(h, c, slots, read, usage, (read @ slots).flatten(1))
