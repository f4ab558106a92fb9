"""Omniglot: every method of ``configs/omniglot``, trained on the same alphabets and tested on alphabets that are new.

    python benchmarks/omniglot.py --root omniglot

Fits each configuration and tests it 5-way 1-shot and 5-shot, on episodes whose classes are drawn over all held-out
alphabets ("mixed") and on episodes within one alphabet each, all with the configuration's seed. Its untrained self, the
same learner with its random initial values, is tested on the first of the mixed episodes. Writes ``results.json``,
``table.md``, and ``curves.png``: accuracy on an alphabet that is neither trained on nor tested on, from the untrained
self on. A method that was done before is not run again, so a run that was stopped goes on. Processor seconds are those
of the fit alone, user and system. The source phase, which the gradient and memory methods have in common, is run once
(``source.safetensors``); its seconds are in those of every method that begins with it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from modmeta.commands.arguments import Arguments
from modmeta.commands.fit import CommandLine
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule, ImageStore
from modmeta.files import write_atomically
from modmeta.learners import BackboneConfig, MetaLearner, SourceLearner
from modmeta.learners.measuring import episode_support
from modmeta.learners.metrics import interval

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "omniglot"
METHODS = ("prototypical", "maml", "mann", "siamese", "matching", "fomaml", "snail", "anil", "reptile", "lstm")
PROTOCOLS = ("mixed", "one alphabet")
SHOTS = (1, 5)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="the folder alphabet/character/image")
    parser.add_argument("--out", default=Path("runs/benchmark-omniglot"), type=Path)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--protocols", nargs="+", default=PROTOCOLS, choices=PROTOCOLS)
    parser.add_argument("--episodes", type=int, default=600, help="test episodes per protocol and number of shots")
    parser.add_argument("--untrained", type=int, default=100, help="test episodes of the untrained self, likewise")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of every fit")
    options = parser.parse_args()
    options.root, options.out = options.root.resolve(), options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)
    quiet()
    warnings.filterwarnings("ignore", category=UserWarning)
    done: dict[str, Row] = {}
    store: ImageStore | None = None
    for method in options.methods:
        kept = Path(f"{method}.json")
        if not kept.exists():
            record, store = measured(method, store, options)
            write_atomically(kept, json.dumps(record, indent=1).encode())
        done[method] = json.loads(kept.read_text())
        rows = [row for record in done.values() for row in record["rows"]]
        write_atomically("results.json", (json.dumps(rows, indent=1) + "\n").encode())
        write_atomically("table.md", table(done).encode())
        plot(done, Path("curves.png"))
    print(table(done))


class Curve(Callback):
    """Measures a learner on the validation alphabet after every epoch of episodes, off the clock."""

    def __init__(self) -> None:
        self.points: list[Row] = []
        self.seconds = 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure it, once the backbone is frozen."""
        assert isinstance(pl_module, MetaLearner)
        begin = time.process_time()
        epochs = trainer.current_epoch + 1 - pl_module.source_epochs
        if epochs > 0:
            self.add(pl_module, trainer.datamodule, epochs)  # type: ignore[attr-defined]
        self.seconds += time.process_time() - begin

    def add(self, learner: MetaLearner, data: DomainDataModule, epochs: int) -> None:
        """Add a point after so many epochs of episodes."""
        seen = epochs * data.hparams["steps_per_epoch"] * data.hparams["episodes_per_step"]
        found = accuracies(learner, data, "val", data.hparams["val_episodes"])
        self.points.append({"episodes": seen, **{f"{k}-shot": float(found[k].mean()) for k in SHOTS}})


def measured(method: str, store: ImageStore | None, options: argparse.Namespace) -> tuple[Row, ImageStore]:
    """Fit and test a method; return what is known of it, and the images for the next one."""
    cli, curve, shared = command_line(method, options, []), Curve(), 0.0
    if store is not None:
        cli.datamodule.store = store
    cli.datamodule.setup()
    tests = tests_of(cli.datamodule, "mixed", options)
    rows = tested(cli.model, tests, f"{method}, untrained", "mixed", options.untrained)
    curve.add(cli.model, cli.datamodule, 0)
    if cli.model.source_epochs:
        shared, words = source_phase(cli)
        cli = command_line(method, options, words)
        cli.datamodule.store = tests.store
    learner, data = cli.model, cli.datamodule
    cli.trainer.callbacks.append(curve)
    begin = time.process_time()
    cli.trainer.fit(learner, data)
    seconds = shared + time.process_time() - begin - curve.seconds
    for protocol in options.protocols:
        rows += tested(learner, tests_of(data, protocol, options), method, protocol, options.episodes)
    return {"rows": rows, "seconds": seconds, "curve": curve.points, "seed": data.hparams["seed"]}, data.store


def command_line(method: str, options: argparse.Namespace, words: list[str]) -> CommandLine:
    """Return learner, data and trainer of a method."""
    given = ["--config", str(CONFIGS / f"{method}.yaml"), "--data.root", str(options.root), "--name", method]
    return CommandLine(Arguments.parse([*given, "--trainer.limit_val_batches", "0", *options.options, *words]))


def source_phase(cli: CommandLine) -> tuple[float, list[str]]:
    """Train the backbone as a method's source phase does, unless it has been; return CPU seconds and the options."""
    weights, record = Path("source.safetensors"), Path("source.json")
    source, backbone = cli.model.source, cli.config["model"]["init_args"]["backbone"]
    drawn = {name: cli.datamodule.hparams[name] for name in ("augment", "batch_size", "steps_per_epoch", "seed")}
    settings = {"source": repr(source), "backbone": repr(backbone.as_dict()), **drawn}
    if not record.exists() or json.loads(record.read_text())["settings"] != settings:
        learner = SourceLearner(BackboneConfig(**backbone.as_dict()), source)
        trainer = Trainer(max_epochs=source.epochs, accelerator="cpu", logger=CSVLogger("runs", "source"),
                          enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
        begin = time.process_time()
        trainer.fit(learner, cli.datamodule)
        seconds = time.process_time() - begin
        write_atomically(weights, (Path(str(trainer.log_dir)) / "backbone.safetensors").read_bytes())
        write_atomically(record, json.dumps({"settings": settings, "seconds": seconds}, indent=1).encode())
    epochs = cli.trainer.max_epochs - source.epochs
    changes = {"model.init_args.source.epochs": 0, "trainer.max_epochs": epochs,
               "model.init_args.backbone.pretrained": weights.resolve()}  # fmt: skip
    words = [str(word) for key, value in changes.items() for word in (f"--{key}", value)]
    return json.loads(record.read_text())["seconds"], words


def tests_of(data: DomainDataModule, protocol: str, options: argparse.Namespace) -> DomainDataModule:
    """Return the test episodes of a protocol."""
    ways = data.hparams["eval_ways"] or data.hparams["ways"]
    changes = {"ways": ways, "mix_domains": protocol == "mixed", "test_episodes": options.episodes}
    tests = DomainDataModule(**{**data.hparams, **changes})
    tests.store = data.store
    tests.setup()
    return tests


def tested(learner: MetaLearner, data: DomainDataModule, system: str, protocol: str, episodes: int) -> list[Row]:
    """Return the accuracy of a learner over test episodes, one row per number of shots."""
    rows = []
    for shots, values in accuracies(learner, data, "test", episodes).items():
        mean, low, high = interval(values)
        ways = data.hparams["eval_ways"] or data.hparams["ways"]
        row = {"system": system, "domain": protocol, "shots": shots, "ways": ways, "metric": "accuracy"}
        rows.append(row | {"value": mean, "low": low, "high": high, "episodes": len(values)})
        print(f"{system}, {protocol}, {shots}-shot: {100 * mean:.1f} ± {50 * (high - low):.1f}", flush=True)
    return rows


def accuracies(learner: MetaLearner, data: DomainDataModule, split: str, episodes: int) -> dict[int, Tensor]:
    """Return by number of shots the accuracies of so many episodes."""
    found: dict[int, list[float]] = {shots: [] for shots in SHOTS}
    index = 0
    while len(found[SHOTS[-1]]) < episodes:
        episode = data.episode(split, index).to(learner.device)
        with torch.no_grad():
            logits = learner.logits(learner.adapt(episode_support(episode, hide=False)), episode.query)
        found[episode.shots].append(float((logits.argmax(1) == episode.query_labels).double().mean()))
        index += 1
    return {shots: torch.tensor(values, dtype=torch.double) for shots, values in found.items()}


def table(done: dict[str, Row]) -> str:
    """Return the accuracies in %, one row per method."""
    cells = {(r["system"], r["domain"], r["shots"]): r for record in done.values() for r in record["rows"]}
    protocols = [protocol for protocol in PROTOCOLS if any(domain == protocol for _, domain, _ in cells)]
    asked = [("", protocol, shots) for protocol in protocols for shots in SHOTS]
    asked += [(", untrained", "mixed", shots) for shots in SHOTS]
    heads = [f"{protocol}{suffix}, {shots}-shot" for suffix, protocol, shots in asked]
    lines = [
        "Accuracy in %: mean and half width of the 95 % interval, 5-way.",
        "",
        f"| method | seed | CPU s | episodes | {' | '.join(heads)} |",
        "|---|---|---|---|" + "---|" * len(heads),
    ]
    for method, record in done.items():
        rows = [cells.get((method + suffix, protocol, shots)) for suffix, protocol, shots in asked]
        shown = [f"{100 * r['value']:.1f} ± {50 * (r['high'] - r['low']):.1f}" if r else "-" for r in rows]
        figures = [method, str(record["seed"]), f"{record['seconds']:.0f}", f"{record['curve'][-1]['episodes']:,}"]
        lines.append(f"| {' | '.join([*figures, *shown])} |")
    counts = {suffix or "trained": cells[next(iter(done)) + suffix, "mixed", 1]["episodes"] for suffix, _, _ in asked}
    shown = ", ".join(f"{key.removeprefix(', ')} {count}" for key, count in counts.items())
    lines += ["", f"Test episodes per figure: {shown}.", ""]
    return "\n".join(lines)


def plot(done: dict[str, Row], path: Path) -> None:
    """Draw accuracy on the validation alphabet against training episodes."""
    figure, panels = plt.subplots(1, len(SHOTS), figsize=(10, 4), sharey=True, layout="constrained")
    for panel, shots in zip(panels, SHOTS, strict=True):
        for method, record in done.items():
            points = record["curve"]
            values = [100 * point[f"{shots}-shot"] for point in points]
            panel.plot([point["episodes"] for point in points], values, ".-", label=method)
        panel.axhline(20, color="grey", linestyle=":", label="chance")
        panel.set(title=f"5-way {shots}-shot", xlabel="training episodes")
        panel.set_xscale("symlog", linthresh=100)
        panel.set_xlim(left=-10)
    panels[0].set_ylabel("accuracy on the validation alphabet, %")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
