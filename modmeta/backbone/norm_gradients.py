"""Gradients to the running statistics of batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modmeta.backbone.overrule import overrule, replaced

BatchNorm = nn.modules.batchnorm._BatchNorm


def differentiate_statistics(model: nn.Module) -> None:
    """Let gradients flow to running means and variances that require them, in every batch norm of a shell.

    PyTorch refuses to differentiate ``batch_norm`` with respect to its running statistics. Their effect is
    linear for given statistics, so it can be moved to weight and bias: with constants m and v of the same
    values, normalising by m and v with weight ``w * sqrt(v / var)`` and bias
    ``b + (m - mean) * w / sqrt(var)`` is the same function of mean and var, bit for bit in value, and
    differentiable to any order.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm) and module.track_running_stats:
            overrule(module, _forward(module))


def _forward(module: nn.Module) -> Callable[..., Tensor]:
    plain: Callable[..., Tensor] = module.forward
    eps: Any = module.eps

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mean, var = module._buffers["running_mean"], module._buffers["running_var"]
        if mean is None or var is None:
            return plain(x, *args, **kwargs)
        if not torch.is_grad_enabled() or not (mean.requires_grad or var.requires_grad):
            return plain(x, *args, **kwargs)
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        deviation, constant = (var + eps).sqrt(), (var.detach() + eps).sqrt()
        gain = 1 if weight is None else weight
        shift = (mean.detach() - mean) * gain / deviation
        moved = {
            "running_mean": mean.detach(),
            "running_var": var.detach(),
            "weight": gain * (constant / deviation),
            "bias": shift if bias is None else bias + shift,
        }
        with replaced(module, moved):
            return plain(x, *args, **kwargs)

    return forward
