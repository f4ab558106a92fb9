"""Every registered adapter module on 17 timm architectures: is it alive, exact, and does it leave the host alone?

    python benchmarks/architectures.py --output runs/architectures

For each pair: units and sites, at how many sites a change reaches the features (all must), whether fresh modules are
the identity bit for bit, whether gradients reach every parameter off the identity, the error of merging, whether
functional and attached calls agree, and whether the backbone is as before. Random weights (seed 0), 64 px, one process
per architecture. Exits with 1 if a pair fails.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matrix.apart import in_process
from matrix.cells import MERGE_LIMIT, fitting, measure
from matrix.hosts import ARCHITECTURES, host, versions
from matrix.tables import markdown, save, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for architectures.json and architectures.md")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, help="names of timm models")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1200.0, help="limit for one architecture")
    options = parser.parse_args()
    found = {}
    for name in options.architectures:
        found[name] = in_process(on_architecture, name, options.image_size, seconds=options.seconds)
        print(f"{name}: {summary(found[name])}", flush=True)
    heads, rows = matrix(found)
    show("sites at which the module is alive / sites", heads, rows)
    worst_heads, worst_rows = worst(found)
    show("worst over all architectures", worst_heads, worst_rows)
    failures = [f"{name}: {line}" for name, result in found.items() for line in failures_of(result)]
    print("\n".join(failures) or "no failure")
    text = f"{versions()}; {options.image_size} px, random weights, seed 0. A dash: no site that the module fits.\n\n"
    text += markdown(heads, rows) + "\n" + markdown(worst_heads, worst_rows)
    text += "\nFailures: " + ("none.\n" if not failures else "\n\n" + "".join(f"- {line}\n" for line in failures))
    save(options.output, "architectures", text, found)
    raise SystemExit(1 if failures else 0)


def on_architecture(name: str, image_size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    backbone = host(name, image_size)
    return {"cells": [asdict(measure(backbone, module)) for module in fitting(backbone)]}


def failures_of(result: dict[str, Any]) -> list[str]:
    lines = [f"{cell['module']}: {line}" for cell in result.get("cells", []) for line in cell["failures"]]
    return [*([result["failure"]] if "failure" in result else []), *lines]


def summary(result: dict[str, Any]) -> str:
    cells = result.get("cells", [])
    live, sites = sum(cell["live"] for cell in cells), sum(cell["sites"] for cell in cells)
    failures = failures_of(result)
    verdict = "; ".join(failures) if failures else "all checks pass"
    return f"{len(cells)} modules, {live}/{sites} sites alive, {result['seconds']:.0f} s; {verdict}"


def matrix(found: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    modules = sorted({cell["module"] for result in found.values() for cell in result.get("cells", [])})
    rows = []
    for name, result in found.items():
        cells = {cell["module"]: cell for cell in result.get("cells", [])}
        shown = [shortly(cells[module]) if module in cells else "-" for module in modules]
        rows.append([name, *(shown if cells else ["failed"] * len(modules))])
    return ["architecture", *modules], rows


def shortly(cell: dict[str, Any]) -> str:
    return f"{cell['live']}/{cell['sites']}" + (" !" if cell["failures"] else "")


def worst(found: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    cells = [cell for result in found.values() for cell in result.get("cells", [])]
    rows = []
    for module in sorted({cell["module"] for cell in cells}):
        own = [cell for cell in cells if cell["module"] == module]
        merges = [cell["merge"] for cell in own if cell["merge"] is not None]
        rows.append(
            [
                module,
                str(len(own)),
                str(sum(cell["units"] for cell in own)),
                f"{sum(cell['live'] for cell in own)}/{sum(cell['sites'] for cell in own)}",
                "bitwise" if not any(cell["identity"] for cell in own) else f"{max(c['identity'] for c in own):.1e}",
                f"{max(merges):.1e}" if merges else "adds computation",
                str(sum(bool(cell["failures"]) for cell in own)),
            ]
        )
    merged = f"merge error (limit {MERGE_LIMIT:.0e})"
    return ["module", "architectures", "units", "live/sites", "identity when fresh", merged, "failed pairs"], rows


if __name__ == "__main__":
    main()
