"""PACS with each domain held out in turn: source classifier, heads on frozen features, and the adapted model.

    python benchmarks/pacs.py --root PACS --weights tf_efficientnet_lite0.safetensors

Trains ``configs/pacs.yaml`` once per held-out domain (seed 0), tests it on the same frozen episodes as its rivals, and
writes ``results.json``, one row per figure, and ``table.md``. A domain that was done before is not run again, so a
run that was stopped goes on. ``--again`` tests every checkpoint a second time and compares bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from modmeta.files import write_atomically

HERE = Path(__file__).resolve().parent
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
SYSTEMS = {
    "source": "source classifier, no adaptation",
    "prototype": "prototype",
    "ridge": "ridge",
    "none": "anchored ridge (no module adapted)",
    "adapted": "adapted",
}
FACTS = (
    ("harm_rate", "episodes harmed by it, %", 100),
    ("parameters_updated", "parameters updated, %", 100),
    ("seconds", "s per adaptation", 1),
)
"""Further rows of the adapted model: metric, name and factor."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="the folder domain/class/image")
    parser.add_argument("--weights", type=Path, help="local weights; default: the hub's")
    parser.add_argument("--out", default=Path("runs/benchmark-pacs"), type=Path)
    parser.add_argument("--domains", nargs="+", default=DOMAINS, choices=DOMAINS)
    parser.add_argument("--episodes", type=int, default=50, help="test episodes per domain and number of shots")
    parser.add_argument("--again", action="store_true", help="test each checkpoint again and compare")
    options = parser.parse_args()
    options.out = options.out.resolve()
    rows = []
    for domain in options.domains:
        rows += held_out(domain, options)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / "results.json", json.dumps(rows, indent=1).encode())
    text = table(rows, options.domains)
    write_atomically(options.out / "table.md", text.encode())
    print(text)


def held_out(domain: str, options: argparse.Namespace) -> list[dict]:
    folder = options.out / domain
    kept = folder / "rows.json"
    if not kept.exists():
        command = ["fit", "--config", str(HERE.parent / "configs" / "pacs.yaml")]
        command += ["--data.root", str(options.root.resolve())]
        command += ["--data.test_domains", f"[{domain}]", "--data.test_episodes", str(options.episodes)]
        if options.weights:
            command += ["--model.init_args.backbone.pretrained", str(options.weights.resolve())]
        begin = time.perf_counter()
        run = launch(command, folder / "fit")
        rows = json.loads((run / "results.json").read_text())
        minutes = (time.perf_counter() - begin) / 60
        rows.append({"system": "adapted", "domain": domain, "shots": 0, "metric": "minutes", "value": minutes})
        write_atomically(kept, json.dumps(rows, indent=1).encode())
    if options.again:
        run = latest(folder / "fit")
        config = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
        second = json.loads((launch(["test", *config], folder / "again") / "results.json").read_text())
        first = json.loads((run / "results.json").read_text())
        same = without_seconds(first) == without_seconds(second)
        print(f"{domain}: test again from the checkpoint is {'bitwise the same' if same else 'DIFFERENT'}")
        if not same:
            raise SystemExit(1)
    return json.loads(kept.read_text())


def launch(command: list[str], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "modmeta", *command], cwd=folder, check=True)
    return latest(folder)


def latest(folder: Path) -> Path:
    return max((path.parent for path in folder.glob("runs/*/*/results.json")), key=lambda run: run.stat().st_mtime)


def without_seconds(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["metric"] != "seconds"]


def table(rows: list[dict], domains: list[str]) -> str:
    cells = {(r["system"], r["domain"], r["shots"], r["metric"]): r for r in rows}
    shots = sorted({r["shots"] for r in rows if r["metric"] == "accuracy"})
    episodes = next(r["episodes"] for r in rows if r["metric"] == "accuracy")
    lines = [
        f"Accuracy in %, mean and half width of the 95 % interval over {episodes} episodes, 7-way, seed 0.",
        "",
        "| shots | system | " + " | ".join(domains) + " | mean |",
        "|---|---|" + "---|" * (len(domains) + 1),
    ]
    for k in shots:
        for system, name in SYSTEMS.items():
            found = [cells[system, domain, k, "accuracy"] for domain in domains]
            values = [f"{100 * r['value']:.1f} ± {50 * (r['high'] - r['low']):.1f}" for r in found]
            mean = 100 * sum(r["value"] for r in found) / len(found)
            lines.append(f"| {k} | {name} | " + " | ".join(values) + f" | {mean:.1f} |")
        gains = [cells["adapted", domain, k, "gain"] for domain in domains]
        shown = [f"{100 * r['value']:+.1f} ± {50 * (r['high'] - r['low']):.1f}" for r in gains]
        mean = 100 * sum(r["value"] for r in gains) / len(gains)
        # Domains are independent of each other: the variance of their mean is the sum of theirs by the number squared.
        half = 50 * math.hypot(*(r["high"] - r["low"] for r in gains)) / len(gains)
        lines.append(f"| {k} | *gain of adapting, paired* | " + " | ".join(shown) + f" | {mean:+.1f} ± {half:.1f} |")
        for metric, name, factor in FACTS:
            found = [factor * cells["adapted", domain, k, metric]["value"] for domain in domains]
            shown = [f"{value:.1f}" for value in found]
            lines.append(f"| {k} | *{name}* | " + " | ".join(shown) + f" | {sum(found) / len(found):.1f} |")
    minutes = [f"{domain} {cells['adapted', domain, 0, 'minutes']['value']:.0f} min" for domain in domains]
    lines += ["", "Fit and test of one held-out domain on 2 CPU cores: " + ", ".join(minutes) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
