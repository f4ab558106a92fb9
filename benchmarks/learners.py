"""Runs every configuration in configs/learners on the embedded digits, and says what it reached and what it took.

    python benchmarks/learners.py --out runs/benchmark-learners

Each trains on some drawing styles and is tested on styles that it has not seen, on the episodes that its own file says;
"before" is the same run's nearest rival without adaptation. Seed 0 in all files. What has run is not run again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from modmeta.files import write_atomically

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "learners"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("--out", default=Path("runs/benchmark-learners"), type=Path)
    parser.add_argument("--learners", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.learners:
        if not (options.out / f"{name}.json").exists():
            run(name, options.out)
    text = table({name: json.loads((options.out / f"{name}.json").read_text()) for name in options.learners})
    write_atomically(options.out / "table.md", text.encode())
    print(text)


def run(name: str, out: Path) -> None:
    folder = out.resolve() / name
    folder.mkdir(exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "modmeta", "fit", "--config", str(CONFIGS / f"{name}.yaml")]
    subprocess.run([*command, "--trainer.enable_progress_bar", "false"], cwd=folder, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    newest = max(folder.glob("runs/*/*/results.json"), key=lambda path: path.stat().st_mtime)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"results": json.loads(newest.read_text()), "cpu_seconds": seconds}
    write_atomically(out / f"{name}.json", json.dumps(found, indent=1).encode())


def table(found: dict[str, dict]) -> str:
    lines = [
        "| configuration | domain | ways | shots | before, % | after, % | gain, points | episodes | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run_ in found.items():
        cells = {(r["system"], r["domain"], r["shots"], r["metric"]): r for r in run_["results"]}
        for (system, domain, shots, metric), after in cells.items():
            if (system, metric) != ("adapted", "accuracy"):
                continue
            none = cells.get(("none", domain, shots, "accuracy"))
            gain = cells.get(("adapted", domain, shots, "gain"))
            lines.append(
                f"| [`{name}`](../configs/learners/{name}.yaml) | {domain} | {after['ways']} | {shots} "
                f"| {percent(none)} | {percent(after)} | {points(gain)} | {after['episodes']} "
                f"| {run_['cpu_seconds']:.0f} |"
            )
    return "\n".join([*lines, ""])


def percent(record: dict | None) -> str:
    if record is None:
        return ""
    return f"{100 * record['value']:.1f} [{100 * record['low']:.1f}, {100 * record['high']:.1f}]"


def points(record: dict | None) -> str:
    if record is None:
        return ""
    return f"{100 * record['value']:+.1f} [{100 * record['low']:+.1f}, {100 * record['high']:+.1f}]"


if __name__ == "__main__":
    main()
