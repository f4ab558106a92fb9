"""The smallest model of every timm family: which sites and cuts are found, and are the modules alive there?

    python benchmarks/families.py --output runs/families

A family is a file of timm's model code. Its smallest model by number of parameters is built with random weights (seed
0) at the smallest of 64, 96, 128, 224 px and the model's default at which it runs, in a process of its own with a time
limit. A module is alive at a site if a gradient of the features reaches it there, or else if perturbing it there
changes them. A family that was done before is not run again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from matrix.apart import in_process
from matrix.cells import MERGE_LIMIT, fitting, merge_error
from matrix.hosts import host, versions
from matrix.tables import markdown, save, show

from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.adapters.liveness import dead_sites
from modmeta.backbone import KINDS, Backbone, Site
from modmeta.errors import ModmetaError

MODULES = ("film", "bias", "lora", "full", "bottleneck", "prompt", "projection")
"""Between them they touch every kind of site; the other modules change the same tensors in other ways."""

SIZES = (64, 96, 128, 224, None)
HEADS = ["family", "model", "M", "px", "sites", "cuts", *MODULES, "notes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for families.json and families.md")
    parser.add_argument("--families", nargs="+", default=sorted(timm.list_modules()), help="names of timm's files")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit for one family")
    options = parser.parse_args()
    kept = options.output / "families.json" if options.output else None
    found = json.loads(kept.read_text()) if kept and kept.exists() else {}
    missing = [family for family in options.families if family not in found]
    with ThreadPoolExecutor(options.jobs) as threads:
        running = {threads.submit(in_process, on_family, family, seconds=options.seconds): family for family in missing}
        for finished in as_completed(running):
            family, result = running[finished], finished.result()
            found[family] = result
            print(f"{family}: {'; '.join(notes(result)) or 'fine'}, {result['seconds']:.0f} s", flush=True)
            write(found, options.output)
    found = {family: found[family] for family in options.families}
    rows = [row(family, result) for family, result in found.items()]
    brief = [column for column, head in enumerate(HEADS) if head not in ("model", "sites", "notes")]
    show(
        "sites at which the module is alive / sites",
        [HEADS[column] for column in brief],
        [[cells[column] for column in brief] for cells in rows],
    )
    print(summary(found))
    write(found, options.output)


def write(found: dict[str, dict[str, Any]], folder: Path | None) -> None:
    rows = [row(family, result) for family, result in sorted(found.items())]
    text = f"{versions()}; random weights, seed 0. {summary(found)}\n\n{markdown(HEADS, rows)}"
    save(folder, "families", text, found)


def on_family(family: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    name, parameters = smallest(family)
    known = {"model": name, "parameters": parameters}
    reasons = []
    for size in SIZES:
        try:
            backbone = host(name, size)
            break
        except ModmetaError as error:
            reasons.append(str(error))
    else:
        return known | {"failure": reasons[-1]}
    known["image_size"] = backbone.image_size
    try:
        known["sites"] = dict(Counter(site.kind for site in backbone.sites))
        known["uncalled"] = [site.name for site in backbone.sites if not site.called]
        known["cuts"] = len(backbone.cuts)
        fit = fitting(backbone)
        known["modules"] = {}
        for module in MODULES:
            if module in fit:
                known["modules"][module] = on_module(backbone, module)
    except Exception as error:  # what was found before it is worth keeping
        known["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return known


def smallest(family: str) -> tuple[str, int]:
    """Return the model of a family with the fewest parameters, counted without allocating any."""
    counts = []
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        counts.append((sum(parameter.numel() for parameter in model.parameters()), name))
    parameters, name = min(counts)
    return name, parameters


def on_module(backbone: Backbone, name: str) -> dict[str, Any]:
    model = AdaptedBackbone(backbone, [UnitConfig(name, group="all")])
    unit = model.units[0]
    silent = without_gradient(model)
    dead = dead_sites(model, replace(unit, sites=silent)) if silent else []
    return {"sites": len(unit.sites), "dead": dead, "merge": merge_error(backbone, name) if name == "full" else None}


def without_gradient(model: AdaptedBackbone) -> tuple[Site, ...]:
    """Return the sites of the model's one unit whose parameters get no gradient from random features' random sum."""
    unit, size = model.units[0], model.backbone.image_size
    generator = torch.Generator().manual_seed(0)
    fresh = model.fresh()
    leaves = {name: fresh[name].requires_grad_() for name in model.learned_names(unit)}
    features = model(torch.rand(2, 3, size, size, generator=generator), fresh, {unit.name: 1.0})
    weight = torch.randn(features.shape, generator=generator)
    found = torch.autograd.grad((features * weight).sum(), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    reached = {name.split("|")[1] for name, gradient in pairs if gradient is not None and gradient.any()}
    return tuple(site for site in unit.sites if site.name not in reached)


def row(family: str, result: dict[str, Any]) -> list[str]:
    kinds = result.get("sites", {})
    modules = result.get("modules", {})
    cells = [f"{m['sites'] - len(m['dead'])}/{m['sites']}" if (m := modules.get(name)) else "-" for name in MODULES]
    return [
        family,
        result.get("model", "?"),
        f"{result['parameters'] / 1e6:.1f}" if "parameters" in result else "?",
        str(result.get("image_size", "?")),
        ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kind in kinds and kind != "features") or "-",
        str(result.get("cuts", "-")),
        *cells,
        "; ".join(notes(result)),
    ]


def notes(result: dict[str, Any]) -> list[str]:
    lines = [result["failure"]] if "failure" in result else []
    for name, module in result.get("modules", {}).items():
        if module["dead"]:
            lines.append(f"{name} dead at {', '.join(module['dead'][:2])}{' ...' if len(module['dead']) > 2 else ''}")
        if module["merge"] is not None and not module["merge"] < MERGE_LIMIT:
            lines.append(f"{name} merges with an error of {module['merge']:.1e}")
    if result.get("cuts") == 0:
        lines.append("cannot be cut: every pass runs all of it")
    return lines


def summary(found: dict[str, dict[str, Any]]) -> str:
    built = [result for result in found.values() if "cuts" in result]
    alive = [r for r in built if "failure" not in r and not any(m["dead"] for m in r["modules"].values())]
    cut = sum(result["cuts"] > 0 for result in built)
    modules = [module for result in built for module in result.get("modules", {}).values()]
    sites = sum(module["sites"] for module in modules)
    live = sites - sum(len(module["dead"]) for module in modules)
    return (
        f"{len(found)} families: {len(built)} run, {cut} can be cut, in {len(alive)} every probed module is alive at "
        f"every site ({live}/{sites} pairs of module and site)."
    )


if __name__ == "__main__":
    main()
