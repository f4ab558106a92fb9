"""Attention that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def second_order_safe() -> Iterator[None]:
    """Compute attention with the one backend that has second derivatives, inside the context.

    The fused attention that timm's transformers call has no double backward; second-order
    meta-gradients through them need this around the forward pass. It costs memory and time.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield
