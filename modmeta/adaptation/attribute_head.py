"""The head of classes that are described by attributes: it starts from these and is corrected by labelled images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modmeta.adaptation.heads import Labelled, register_head
from modmeta.adaptation.ridge_heads import AnchoredRidgeHead


@register_head("attribute")
class AttributeHead(AnchoredRidgeHead):
    """Ridge regression on what a classifier made of class attributes leaves unexplained.

    Its anchor knows every class that has attributes, whether the sources have images of it or not. Images of a class
    correct the class's weights. They also take away some of the offset that the anchor puts on classes that the
    sources have images of: after ``n`` images ``1 / (1 + fade n)`` of it is left, where ``fade`` is learned.
    """

    needs_attributes = True

    def __init__(self, scale: float = 10.0, ridge: float = 1.0) -> None:
        super().__init__(scale, ridge)
        self.log_fade = nn.Parameter(torch.zeros(()))

    def _start(self, x: Tensor, support: Labelled) -> tuple[Tensor, Tensor]:
        weight, bias = super()._start(x, support)
        if support.anchor is not None:
            bias = support.anchor.bias / (1 + self.log_fade.exp() * support.one_hot.sum(0))
        return weight, bias
