"""LoRA, IA3 and tuned normalisation layers: PEFT and modmeta side by side on the same 17 architectures and layers.

    python benchmarks/peft_matrix.py --output runs/peft

Both get the same backbone (random weights, seed 0, 64 px) and the same layers: convolutions and linear layers for LoRA,
``qkv`` and the MLP's second layer for IA3 (every convolution where there are none), normalisation layers for the third.
PEFT is told of the layers by a regular expression of their full names, and of the MLP layers as
``feedforward_modules``. The number of groups of a grouped convolution must divide its rank: ``rank_pattern`` gives it
the least such rank.

``live``: layers at which a change of the adapter reaches the features. ``merge``: error of features after merging,
relative where they exceed 1. ``restored``: after unloading, the model has the names and bits it had. ``apart``: a
forward pass in train mode with adapter B leaves the features under adapter A as they were.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matrix.apart import in_process
from matrix.cells import measure
from matrix.hosts import ARCHITECTURES, host, versions
from matrix.tables import markdown, save, show
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from modmeta.adapters import MODULES, AdaptedBackbone, UnitConfig
from modmeta.backbone import Backbone, Site

METHODS = {"lora": "lora", "ia3": "ia3", "norm": "film"}
"""The name in the table, and modmeta's module."""

RANK = 4
HEADS = ["architecture", "method", "library", "attached", "live", "identity", "merge", "restored", "apart", "notes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for peft.json and peft.md")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, help="names of timm models")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=900.0, help="limit for one architecture")
    options = parser.parse_args()
    found = {}
    for name in options.architectures:
        found[name] = in_process(on_architecture, name, options.image_size, seconds=options.seconds)
        print(f"{name}: {found[name].get('failure', 'measured')}, {found[name]['seconds']:.0f} s", flush=True)
    rows = [shown(name, cell) for name, result in found.items() for cell in result.get("cells", [])]
    show("PEFT and modmeta side by side", HEADS[:-1], [row[:-1] for row in rows])
    heads, totals = summary([cell for result in found.values() for cell in result.get("cells", [])])
    show("over all architectures", heads, totals)
    text = f"{versions('peft')}; {options.image_size} px, random weights, seed 0.\n\n"
    text += markdown(heads, totals) + "\n" + markdown(HEADS, rows)
    save(options.output, "peft", text, found)


def on_architecture(name: str, image_size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    backbone = host(name, image_size)
    cells = []
    for method in METHODS:
        targets = layers(backbone, method)
        cells.append({"method": method, "library": "PEFT", **with_peft(backbone, method, targets)})
        cells.append({"method": method, "library": "modmeta", **with_modmeta(backbone, METHODS[method], len(targets))})
    return {"cells": cells}


def layers(backbone: Backbone, method: str) -> list[Site]:
    """Return the layers that a method is asked to adapt."""
    module = MODULES.get(METHODS[method])
    chosen = [site for site in backbone.sites if module.fits(site)]
    return chosen or [site for site in backbone.sites if site.kind in ("conv", "dwconv", "pwconv")]


# ---------------------------------------------------------------------- PEFT


def with_peft(backbone: Backbone, method: str, targets: Sequence[Site]) -> dict[str, Any]:
    images = probe_images(backbone)
    plain = copy.deepcopy(backbone.model).requires_grad_(False)  # PEFT does so too, and kernels depend on it
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    found: dict[str, Any] = {"asked": len(targets), "notes": []}
    with torch.no_grad():
        expected = plain(images)
        try:
            model = get_peft_model(plain, config(method, targets), adapter_name="a").eval()
        except Exception as error:
            return found | {"attached": 0, "notes": [first_line(error)]}
        fresh = model(images)
        found |= {"attached": len(tuned(model)), "identity": float((fresh - expected).abs().max())}
        dead = [name for name, layer in tuned(model).items() if dead_layer(model, layer, images, fresh)]
        found["live"] = found["attached"] - len(dead)
        if dead:
            found["notes"].append(f"dead: {', '.join(dead[:2])}{' ...' if len(dead) > 2 else ''}")
        restored = copy.deepcopy(model).unload().state_dict()
        found["restored"] = before.keys() == restored.keys() and all(
            torch.equal(tensor, restored[key]) for key, tensor in before.items()
        )
        for layer in tuned(model).values():
            move(layer, "a")
        moved = model(images)
        try:
            merged = copy.deepcopy(model).merge_and_unload()(images)
            found["merge"] = float((merged - moved).abs().max()) / max(1.0, float(moved.abs().max()))
        except Exception as error:
            found["notes"].append(f"merge: {first_line(error)}")
        model.add_adapter("b", config(method, targets))
        model.set_adapter("b")
        model.train()
        model(probe_images(backbone, count=8))
        model.eval()
        model.set_adapter("a")
        found["apart"] = torch.equal(model(images), moved)
    return found


def config(method: str, targets: Sequence[Site]) -> PeftConfig:
    chosen = pattern(targets)
    if method == "lora":
        grouped = [site for site in targets if site.groups > 1]
        ranks = {re.escape(site.name): -(-RANK // site.groups) * site.groups for site in grouped}
        return LoraConfig(r=RANK, target_modules=chosen, rank_pattern=ranks)
    if method == "ia3":
        hidden = [site for site in targets if site.kind == "mlp"]
        return IA3Config(target_modules=chosen, feedforward_modules=pattern(hidden) if hidden else [])
    return LNTuningConfig(target_modules=chosen)


def pattern(sites: Sequence[Site]) -> str:
    return "|".join(re.escape(site.name) for site in sites)


def tuned(model: PeftModel) -> dict[str, nn.Module]:
    """Return the layers that carry an adapter, by their names in the timm model."""
    named = model.base_model.model.named_modules()
    return {name: module for name, module in named if hasattr(module, "base_layer")}


def tensors(layer: nn.Module, adapter: str) -> list[Tensor]:
    """Return the parameters of one layer's adapter."""
    return [
        parameter
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer") and adapter in name.split(".")
    ]


def move(layer: nn.Module, adapter: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors(layer, adapter):
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def dead_layer(model: PeftModel, layer: nn.Module, images: Tensor, fresh: Tensor) -> bool:
    kept = [tensor.clone() for tensor in tensors(layer, "a")]
    move(layer, "a")
    dead = torch.equal(model(images), fresh)
    for tensor, old in zip(tensors(layer, "a"), kept, strict=True):
        tensor.copy_(old)
    return dead


# ---------------------------------------------------------------------- modmeta


def with_modmeta(backbone: Backbone, name: str, asked: int) -> dict[str, Any]:
    if not any(MODULES.get(name).fits(site) for site in backbone.sites):
        return {"asked": asked, "attached": 0, "notes": [f"{name} fits no site"]}
    cell = measure(backbone, name)
    return {
        "asked": asked,
        "attached": cell.sites,
        "live": cell.live,
        "identity": cell.identity,
        "merge": cell.merge,
        "restored": not any(failure.startswith("host") for failure in cell.failures),
        "apart": apart(backbone, name),
        "notes": list(cell.failures),
    }


@torch.no_grad()
def apart(backbone: Backbone, name: str) -> bool:
    model = AdaptedBackbone(backbone, [UnitConfig(name, group="all")])
    gates = {model.units[0].name: 1.0}
    generator = torch.Generator().manual_seed(0)
    a, b = (
        {key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in model.fresh().items()}
        for _ in "ab"
    )
    images = torch.rand(2, 3, backbone.image_size, backbone.image_size, generator=generator)
    before = model(images, a, gates)
    model.train()
    model(torch.rand(8, *images.shape[1:], generator=generator), b, gates)
    model.eval()
    return torch.equal(model(images, a, gates), before)


# ---------------------------------------------------------------------- tables


def shown(name: str, cell: dict[str, Any]) -> list[str]:
    live = "-" if "live" not in cell else f"{cell['live']}/{cell['attached']}"
    identity = cell.get("identity")
    merge = cell.get("merge")
    return [
        name,
        cell["method"],
        cell["library"],
        f"{cell['attached']}/{cell['asked']}",
        live,
        "-" if identity is None else "bitwise" if identity == 0 else f"{identity:.0e}",
        "-" if merge is None else f"{merge:.0e}",
        *(answer(cell.get(key)) for key in ("restored", "apart")),
        "; ".join(cell["notes"]),
    ]


def answer(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "**no**"


def summary(cells: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    def count(own: Sequence[dict[str, Any]], key: str, good: Callable[[Any], bool]) -> str:
        values = [cell[key] for cell in own if cell.get("attached")]
        return f"{sum(good(value) for value in values)}/{len(values)}"

    rows = []
    for method in METHODS:
        for library in ("PEFT", "modmeta"):
            own = [cell for cell in cells if cell["method"] == method and cell["library"] == library]
            own = [cell | {"merge": cell.get("merge")} for cell in own]
            attached = sum(cell["attached"] for cell in own)
            rows.append(
                [
                    method,
                    library,
                    f"{sum(cell['attached'] > 0 for cell in own)}/{len(own)}",
                    f"{attached}/{sum(cell['asked'] for cell in own)}",
                    f"{sum(cell.get('live', 0) for cell in own)}/{attached}",
                    count(own, "identity", lambda value: value == 0),
                    count(own, "merge", lambda value: value is not None and value < 1e-4),
                    count(own, "restored", bool),
                    count(own, "apart", bool),
                ]
            )
    heads = ["method", "library", "architectures", "layers attached", "live", "identity bitwise", "merges (< 1e-4)"]
    return [*heads, "restored", "A apart from B"], rows


def probe_images(backbone: Backbone, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return backbone.prepare(torch.rand(count, 3, backbone.image_size, backbone.image_size, generator=generator))


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


if __name__ == "__main__":
    main()
