"""The conformance kit: passes what ships, and names what is wrong with every kind of broken module."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from modmeta.adapters import MODULES, AdapterModule, Layer, check_module
from modmeta.adapters.module import register_module
from modmeta.backbone import Site


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bias", {}),
        ("bottleneck", {}),
        ("bottleneck", {"reduction": 1}),
        ("film", {}),
        ("full", {}),
        ("ia3", {}),
        ("lora", {"rank": 2}),
        ("norm_blend", {}),
        ("projection", {}),
        ("projection", {"rank": None}),
        ("prompt", {"length": 2}),
        ("prompt", {"deep": False}),
        ("residual", {}),
        ("scale", {}),
        ("scale", {"per_tap": True}),
    ],
)
def test_what_ships_conforms(name: str, options: dict[str, Any]) -> None:
    check_module(MODULES.get(name), backbones=("test_efficientnet", "test_vit"), **options)


class _Gamma(AdapterModule):
    """Adds to the weight of norms; every broken module below spoils one thing about it."""

    kinds = frozenset({"norm"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.delta = nn.Parameter(torch.zeros(site.shapes["weight"]))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": tensors["weight"] + self.delta}


@register_module("test_sound")
class Sound(_Gamma):
    pass


@register_module("test_not_identity")
class NotIdentity(_Gamma):
    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": tensors["weight"] + self.delta + 1e-4}


@register_module("test_identity_but_for_rounding")
class IdentityButForRounding(_Gamma):
    kinds = frozenset({"conv"})

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": (tensors["weight"] + self.delta) * 3.3 / 3.3}


@register_module("test_dead")
class Dead(_Gamma):
    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": tensors["weight"] + 0 * self.delta}


@register_module("test_impure")
class Impure(_Gamma):
    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            self.delta.mul_(1.5)
        return super().overlay(tensors)


@register_module("test_detached")
class Detached(_Gamma):
    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": tensors["weight"] + self.delta.detach()}


@register_module("test_unused")
class Unused(_Gamma):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.unused = nn.Parameter(torch.zeros(3))


@register_module("test_alias")
class Alias(_Gamma):
    """Keeps a second way to its parameter, which a functional call cannot replace."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.bias = nn.Parameter(torch.zeros(site.shapes["weight"]))
        self.alias = [self.bias.data]

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": tensors["weight"] + self.delta + self.bias + self.alias[0]}


@register_module("test_unpicklable")
class Unpicklable(_Gamma):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.function = lambda x: x


@register_module("test_shares_copies")
class SharesCopies(_Gamma):
    def __deepcopy__(self, memo: dict[int, Any]) -> "SharesCopies":
        return self


@register_module("test_writes_host")
class WritesHost(_Gamma):
    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors["bias"].add_(1e-3)
        return super().overlay(tensors)


@register_module("test_no_vmap")
class NoVmap(_Gamma):
    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = math.exp(self.delta.mean().item())
        return {"weight": tensors["weight"] * scale + self.delta}


@register_module("test_float_only")
class FloatOnly(_Gamma):
    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": tensors["weight"] + self.delta.float()}


@register_module("test_unmergeable")
class Unmergeable(_Gamma):
    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**super().overlay(tensors), "shift": self.delta}


@register_module("test_observes_wrongly")
class ObservesWrongly(_Gamma):
    def observe(self, x: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": x.mean()}


@register_module("test_nothing")
class Nothing(AdapterModule):
    kinds = frozenset({"norm"})


@register_module("test_fits_nowhere")
class FitsNowhere(_Gamma):
    requires = frozenset({"no_such_tensor"})


class _Around(AdapterModule):
    """Runs its block again; the broken one keeps what belongs to one pass on the module."""

    kinds = frozenset({"block"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.strength = nn.Parameter(torch.zeros(()))

    def rerun(self, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
        return y + self.strength * (layer.run(2 * x) - y)


@register_module("test_sound_around")
class SoundAround(_Around):
    pass


@register_module("test_remembers")
class Remembers(_Around):
    calls: ClassVar[list[int]] = []

    def rerun(self, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
        self.calls.append(1)
        return y + self.strength * len(self.calls) * layer.run(x)


class Unregistered(_Gamma):
    pass


@pytest.mark.parametrize("sound", [Sound, SoundAround])
def test_a_sound_module_of_ones_own_conforms(sound: type[AdapterModule]) -> None:
    check_module(sound, backbones=("test_efficientnet",))


def test_a_module_is_tried_where_it_has_a_meaning() -> None:
    prompt = MODULES.get("prompt")
    check_module(prompt, length=1)  # among the default backbones, a transformer only
    with pytest.raises(AssertionError, match="Prompt: contract: none of test_resnet, test_convnext has a site"):
        check_module(prompt, backbones=("test_resnet", "test_convnext"))
    with pytest.raises(AssertionError, match=r"FitsNowhere: contract: none of test_resnet, .* has a site that it fits"):
        check_module(FitsNowhere)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (NotIdentity, "identity when fresh: fresh, it changes features by up to"),
        (IdentityButForRounding, "identity when fresh"),
        (Dead, "liveness: DeadUnitError: unit 'test_dead@all' is dead"),
        (Impure, "pure function of the state"),
        (Detached, "gradients"),
        (Unused, "liveness|gradients: no gradient reaches '.*unused'"),
        (Alias, "functional call equals attached call: it does not read all"),
        (Unpicklable, "deepcopy and pickle: .*[Pp]ickl"),
        (SharesCopies, "deepcopy and pickle: a deepcopy shares tensors"),
        (WritesHost, "the backbone was changed"),
        (NoVmap, "vmap: RuntimeError"),
        (FloatOnly, "bfloat16"),
        (Unmergeable, "KeyError: 'shift'|unknown tensor"),
        (ObservesWrongly, "observe returns '.*mean', which is no buffer"),
        (Nothing, "contract: neither overlay nor forward"),
        (FitsNowhere, "contract: none of test_efficientnet has a site that it fits"),
        (Remembers, "pure function of the state: two calls with the same state differ"),
        (Unregistered, "contract: the class has no name"),
    ],
)
def test_broken_modules_fail_by_name(broken: type[AdapterModule], expected: str) -> None:
    with pytest.raises(AssertionError, match=expected) as caught:
        check_module(broken, backbones=("test_efficientnet",))
    assert broken.__name__ in str(caught.value)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(AssertionError, match=r"unknown option of adapter module 'lora': 'rnak'.*'rank'"):
        check_module(MODULES.get("lora"), backbones=("test_efficientnet",), rnak=2)


def test_the_kit_leaves_its_backbones_as_they_were_for_the_next_module() -> None:
    with pytest.raises(AssertionError, match="the backbone was changed"):
        check_module(WritesHost, backbones=("test_efficientnet",))
    check_module(Sound, backbones=("test_efficientnet",))
