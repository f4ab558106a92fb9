"""One policy, other backbones and other data: a policy that was meta-trained elsewhere serves them as it is.

    python -m modmeta fit --config configs/quickstart.yaml
    python benchmarks/policy_transfer.py --policy runs/quickstart/version_0/checkpoints/last.ckpt --omniglot omniglot

Cases: the digits on another backbone, and Omniglot's alphabets, whose classes are new in every test domain, on the
backbone of the quickstart and on the other one. A backbone is trained on the source domains (``SourceLearner``); then
``policy_from`` takes policy, standardisation of the indicators, head strengths and the veto's record from the
checkpoint, nothing is meta-trained, and the held-out domains are tested, seed 0. "Before" is the same head on
unadapted features and the same support. Writes ``results.json`` and ``table.md``; a case that was done is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from modmeta.files import write_atomically

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
ALPHABETS = {"own_classes": "true", "val_domains": "[Greek]", "test_domains": "[Balinese, Early_Aramaic, Tagalog]"}
EPOCHS = 24  # of source training, as in the quickstart
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, type=Path, help="checkpoint of the quickstart")
    parser.add_argument("--omniglot", type=Path, help="the folder alphabet/character/image; left out without it")
    parser.add_argument("--backbone", default="test_resnet", help="the other timm model")
    parser.add_argument("--episodes", type=int, default=200, help="per test domain and number of shots")
    parser.add_argument("--out", default=Path("runs/benchmark-policy-transfer"), type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cases: list[tuple[str, str, dict[str, str]]] = [("digits", options.backbone, {})]
    if options.omniglot is not None:
        data = {"root": str(options.omniglot.resolve()), **ALPHABETS}
        cases += [("Omniglot", name, data) for name in ("test_efficientnet", options.backbone)]
    found = {}
    for name, backbone, data in cases:
        kept = options.out / f"{name}-{backbone}.json"
        if not kept.exists():
            rows = measured(kept.stem, backbone, data, options)
            write_atomically(kept, json.dumps(rows, indent=1).encode())
        found[name, backbone] = json.loads(kept.read_text())
    rows = [row | {"backbone": backbone} for (_, backbone), own in found.items() for row in own]
    write_atomically(options.out / "results.json", json.dumps(rows, indent=1).encode())
    text = table(found)
    write_atomically(options.out / "table.md", text.encode())
    print(text)


def measured(name: str, backbone: str, data: dict[str, str], options: argparse.Namespace) -> list[Row]:
    """Train a backbone on the source domains, test it under the policy, and return the test's figures."""
    folder = options.out.resolve() / name
    folder.mkdir(exist_ok=True)
    given = [word for key, value in data.items() for word in (f"--data.{key}", value)]
    begin = ["--trainer.max_epochs", str(EPOCHS), "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0",
             "--data.image_size", "32", "--data.steps_per_epoch", "20", "--model", "SourceLearner",
             "--model.init_args.backbone.name", backbone, "--model.init_args.backbone.pretrained", "false",
             "--model.init_args.backbone.image_size", "32", "--name", "source"]  # fmt: skip
    if not data:
        begin += ["--data.val_domains", "[slanted]", "--data.test_domains", "[paper]"]
    source = launch(["fit", *begin, *given], folder, "source")
    parts = {"backbone.name": backbone, "backbone.pretrained": str(source / "backbone.safetensors"),
             "source.epochs": "0", "policy_from": str(options.policy.resolve())}  # fmt: skip
    changes = [word for key, value in parts.items() for word in (f"--model.init_args.{key}", value)]
    asked = ["--config", str(CONFIG), "--name", "test", "--data.test_episodes", str(options.episodes)]
    tested = launch(["test", *asked, *changes, *given], folder, "test")
    rows: list[Row] = json.loads((tested / "results.json").read_text())
    return rows


def launch(command: list[str], folder: Path, name: str) -> Path:
    subprocess.run([sys.executable, "-m", "modmeta", *command, "--trainer.enable_progress_bar", "false"], cwd=folder,
                   check=True)  # fmt: skip
    return max((folder / "runs" / name).iterdir(), key=lambda run: run.stat().st_mtime)


def table(found: dict[tuple[str, str], list[Row]]) -> str:
    lines = [
        "Accuracy in %, 5-way; gains are paired, with 95 % intervals.", "",
        "| data | backbone | domain | shots | before | after | gain, points | units updated, % | episodes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (name, backbone), rows in found.items():
        cells = {(r["system"], r["domain"], r["shots"], r["metric"]): r for r in rows}
        for system, domain, shots, metric in cells:
            if (system, metric) != ("adapted", "gain"):
                continue
            before, after = (cells[each, domain, shots, "accuracy"] for each in ("none", "adapted"))
            gain, units = (cells["adapted", domain, shots, each] for each in ("gain", "units_updated"))
            interval = f"{100 * gain['value']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
            lines.append(
                f"| {name} | {backbone} | {domain} | {shots} | {100 * before['value']:.1f} "
                f"| {100 * after['value']:.1f} | {interval} | {100 * units['value']:.0f} | {gain['episodes']} |"
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
