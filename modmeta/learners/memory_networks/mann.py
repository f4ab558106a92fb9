"""A memory-augmented network: a controller with an external memory that is addressed by content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        """Return ``count`` copies of a memory of one sequence, to go on from independently."""
        return _Memory(**{name: t.expand(count, *t.shape[1:]) for name, t in vars(self).items()})


@register_memory_network("mann")
class MANNMemory(MemoryNetwork):
    """Writes what it sees to the least recently used slots, or to those just read, and reads by content.

    Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", ICML 2016. At every step it sees an
    image and the label of the image before. Reads have a learned sharpness (Graves, Wayne and Danihelka, "Neural Turing
    Machines", 2014): cosine similarities lie within -1..1, and their softmax alone would be almost flat.

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
        self.slots, self.word, self.reads, self.decay = slots, word, reads, decay
        self.controller = nn.LSTMCell(width + ways + reads * word, hidden)
        self.keys = nn.Linear(hidden, reads * word)
        self.sharpness = nn.Linear(hidden, reads)
        self.gates = nn.Linear(hidden, reads)
        self.output = nn.Linear(hidden + reads * word, ways)

    def read(self, features: Tensor, codes: Tensor) -> Recall:
        """Run over the support, each image with the label of the one before."""
        before = torch.cat([torch.zeros_like(codes[:1]), codes[:-1]])
        memory = self._empty(features)
        for x, code in zip(features, before, strict=True):
            memory = self._step(x[None], code[None], memory)

        def recall(queries: Tensor) -> Tensor:
            after = self._step(queries, codes[-1].expand(len(queries), -1), memory.repeated(len(queries)))
            logits: Tensor = self.output(torch.cat([after.h, after.words], dim=-1))
            return logits

        return recall

    def _empty(self, like: Tensor) -> _Memory:
        zeros = like.new_zeros
        hidden = self.controller.hidden_size
        slots = torch.full_like(zeros(1, self.slots, self.word), 1e-3)  # the cosine with a zero slot has no slope
        return _Memory(
            h=zeros(1, hidden),
            c=zeros(1, hidden),
            slots=slots,
            read=zeros(1, self.reads, self.slots),
            usage=zeros(1, self.slots),
            words=zeros(1, self.reads * self.word),
        )

    def _step(self, x: Tensor, code: Tensor, memory: _Memory) -> _Memory:
        h, c = self.controller(torch.cat([x, code, memory.words], dim=-1), (memory.h, memory.c))
        keys = self.keys(h).tanh().unflatten(-1, (self.reads, self.word))
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
