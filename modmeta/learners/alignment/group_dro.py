"""GroupDRO: what counts is the domain with the highest risk."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from modmeta.errors import refuse_outside
from modmeta.learners.alignment.alignment import Alignment, SourceOutputs, register_alignment


@register_alignment("group_dro")
class GroupDro(Alignment):
    """Risks weighted by domain, where every step raises the weights of domains by their risk.

    Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020, algorithm 1: before each step
    ``q_g <- q_g exp(step * risk_g)``, normalised; a domain that the batch does not hold keeps its share of the rest.
    Risks are those of the whole batch, over all processes.

    Args:
        feature_dim: length of the features.
        domains: number of source domains.
        step: step size of the weights, 0 or more.

    Attributes:
        weights: ``(domains,)``, summing to 1.
    """

    weights: Tensor

    def __init__(self, feature_dim: int, domains: int, step: float = 0.01) -> None:
        super().__init__(feature_dim, domains)
        refuse_outside({"alignment.options.step": step}, 0)
        self.step = step
        self.register_buffer("weights", torch.full((domains,), 1 / domains))

    def forward(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Raise the weights and return the weighted sum of the domains' risks."""
        own = torch.zeros_like(self.weights, dtype=outputs.logits.dtype).index_add(0, outputs.domains, outputs.risks)
        counts = torch.bincount(outputs.domains, minlength=len(self.weights)).to(own)
        sums, processes = own.detach().clone(), 1
        if distributed.is_available() and distributed.is_initialized():
            processes = distributed.get_world_size()
            distributed.all_reduce(sums)
            distributed.all_reduce(counts)
        counts = counts.clamp_min(1)
        raised = self.weights * (self.step * sums / counts).to(self.weights).exp()
        self.weights.copy_(raised / raised.sum())
        # Gradients are averaged over the processes, each of which knows its own images only.
        return processes * (self.weights * own / counts).sum()
