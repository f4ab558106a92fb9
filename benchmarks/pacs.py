"""PACS with each domain held out in turn: source classifier, heads on frozen features, and the adapted model.

    python benchmarks/pacs.py --root PACS --weights tf_efficientnet_lite0.safetensors

Trains ``configs/pacs.yaml`` once per held-out domain (seed 0), compares ``configs/compare/pacs_long.yaml`` on the same
frozen episodes, and writes ``table.md`` beside the comparison's own report. A domain that was fitted before is
not fitted again, and the comparison goes on where it was stopped, so ``--episodes`` may grow. ``--fit`` changes
settings of the fits, such as ``trainer.max_epochs=4``. ``--again`` measures everything a second time and compares bit
for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from modmeta.evaluation.compare import Row, RowFile
from modmeta.evaluation.compare.settings import MEAN
from modmeta.files import write_atomically

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
ROWS = (
    ("source", "accuracy", "source classifier, no adaptation", 100),
    ("prototype", "accuracy", "prototype", 100),
    ("ridge", "accuracy", "ridge", 100),
    ("anchored_ridge", "accuracy", "anchored ridge (no module adapted)", 100),
    ("policy", "accuracy", "adapted", 100),
    ("policy", "gain", "*gain of adapting, paired*", 100),
    ("policy", "harm_rate", "*episodes harmed by it, %*", 100),
    ("policy", "parameters_updated", "*parameters updated, %*", 100),
    ("policy", "seconds", "*s per adaptation*", 1),
)
"""Rows of the table: system, metric, name and factor."""
WITH_INTERVAL = ("accuracy", "gain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="the folder domain/class/image")
    parser.add_argument("--weights", type=Path, help="local weights; default: the hub's")
    parser.add_argument("--out", default=Path("runs/benchmark-pacs"), type=Path)
    parser.add_argument("--domains", nargs="+", default=DOMAINS, choices=DOMAINS)
    parser.add_argument("--episodes", type=int, default=300, help="test episodes per domain and number of shots")
    parser.add_argument("--fit", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the fits, changed")
    parser.add_argument("--again", action="store_true", help="measure again and compare")
    options = parser.parse_args()
    out = options.out.resolve()
    checkpoints = {domain: fitted(domain, out / domain / "fit", options) for domain in options.domains}
    measured = compared(checkpoints, out / "compare", options)
    text = table(json.loads((measured / "results.json").read_text()), options.domains)
    write_atomically(out / "table.md", text.encode())
    print(text)
    if options.again:
        first, second = (rows_of(folder) for folder in (measured, compared(checkpoints, out / "again", options)))
        print(f"measured again: {'bitwise the same' if first == second else 'DIFFERENT'}")
        if first != second:
            raise SystemExit(1)


def fitted(domain: str, folder: Path, options: argparse.Namespace) -> str:
    """Return the checkpoint of a fit that has not seen a domain."""
    if not (folder / "minutes").exists():
        command = ["fit", "--config", str(CONFIGS / "pacs.yaml"), "--test_after_fit", "false"]
        command += ["--data.root", str(options.root.resolve()), "--data.test_domains", f"[{domain}]"]
        if options.weights:
            command += ["--model.init_args.backbone.pretrained", str(options.weights.resolve())]
        command += [f"--{setting}" for setting in options.fit]
        begin = time.perf_counter()
        launch(command, folder)
        write_atomically(folder / "minutes", f"{(time.perf_counter() - begin) / 60:.0f}".encode())
    print(f"{domain}: fitted in {(folder / 'minutes').read_text()} min")
    found = folder.glob("runs/pacs/*/checkpoints/last.ckpt")
    last = max(found, key=lambda path: path.stat().st_mtime)  # one that was stopped may lie beside it
    config = OmegaConf.load(last.parents[1] / "config.yaml")
    for key, _, value in (setting.partition("=") for setting in options.fit):
        fitted_with = OmegaConf.select(config, key)
        if fitted_with != yaml.safe_load(value):
            raise SystemExit(f"{folder} holds a fit whose {key} is {fitted_with}, not {value}; choose another --out")
    return str(last)


def compared(checkpoints: dict[str, str], output: Path, options: argparse.Namespace) -> Path:
    """Return the folder of a comparison that is complete."""
    command = ["compare", "--config", str(CONFIGS / "compare" / "pacs_long.yaml"), "--output", str(output)]
    command += ["--data.root", str(options.root.resolve()), "--episodes", str(options.episodes)]
    launch([*command, "--checkpoints", json.dumps(checkpoints)], output.parent)
    return output


def launch(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "modmeta", *command], cwd=folder, check=True)


def rows_of(folder: Path) -> dict[tuple, Row]:
    """Return all that was measured but the time."""
    return {key: replace(row, seconds=0.0) for key, row in RowFile(folder / "rows.jsonl").rows.items()}


def table(results: Sequence[dict], domains: Sequence[str]) -> str:
    """Return the figures of a comparison, by number of shots and domain."""
    cells = {(r["system"], r["metric"], r["domain"], r["shots"]): r for r in results}
    episodes = cells["policy", "accuracy", domains[0], min(r["shots"] for r in results)]["episodes"]
    lines = [
        f"Accuracy in %, mean and half width of the 95 % bootstrap interval over {episodes} episodes with 40 query "
        "images per class, 7-way, seed 0.",
        "",
        "| shots | system | " + " | ".join(domains) + " | mean |",
        "|---|---|" + "---|" * (len(domains) + 1),
    ]
    for shots in sorted({r["shots"] for r in results}):
        for system, metric, name, factor in ROWS:
            found = [cells[system, metric, domain, shots] for domain in (*domains, MEAN)]
            sign = "+" if metric == "gain" else ""
            shown = [f"{factor * each['value']:{sign}.1f}" for each in found]
            if metric in WITH_INTERVAL:
                halves = [factor * (each["high"] - each["low"]) / 2 for each in found]
                shown = [f"{value} ± {half:.1f}" for value, half in zip(shown, halves, strict=True)]
            lines.append(f"| {shots} | {name} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
