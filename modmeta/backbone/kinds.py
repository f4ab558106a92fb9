"""Which modules are sites, and of what kind."""

from __future__ import annotations

from torch import nn

_QKV = {"qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj"}
_MLP = {"fc1", "fc2", "w1", "w2", "w3", "w12", "fc1_g", "fc1_x", "mlp", "ffn"}
# Channels come second in the output of these, whatever its rank.
_SECOND_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def kind_of(name: str, module: nn.Module) -> str | None:
    """Return the kind of site that a layer is, or None.

    Args:
        name: path of the module in the model; it tells the roles of linear layers apart.
        module: the module.
    """
    if _is_norm(module):
        return "norm"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return "dwconv" if module.groups == module.in_channels else "conv"
        return "pwconv" if module.kernel_size == (1, 1) else "conv"
    if isinstance(module, nn.Linear):
        segments = set(name.split("."))
        if segments & _QKV:
            return "qkv"
        return "mlp" if segments & _MLP else "proj"
    return None


def channels_of(module: nn.Module) -> int:
    """Return the number of output channels of a layer that is a site."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    weight = module.get_parameter("weight")
    return int(weight.shape[0])


def channel_dim_of(module: nn.Module, rank: int | None) -> int:
    """Return the axis of the channels in a layer's output.

    Args:
        module: a layer that is a site.
        rank: number of dimensions of its output; None if it is not known.
    """
    second = isinstance(module, (nn.Conv2d, *_SECOND_NORMS)) or (_is_norm(module) and "2d" in type(module).__name__)
    return 1 if second and rank != 2 else -1


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    named = isinstance(module, (nn.LayerNorm, *_SECOND_NORMS)) or "norm" in type(module).__name__.lower()
    return named and weight is not None and weight.ndim == 1
