"""What is there to win by choosing an action per domain? The action grid, the oracle gap, and the gates E0 and E1.

    python benchmarks/action_grid.py --config configs/quickstart.yaml --episodes 120 --split train --output runs/grid
    python benchmarks/action_grid.py --config configs/pacs.yaml --data.root PACS --episodes 200 --output runs/grid-pacs

The backbone is trained on the source domains if the configuration says so, the sources are measured, and every action
of a fixed grid is carried out on the same episodes (the policy plays no part in it). The output folder holds the
action table in parts (``part-*.parquet``), ``gap.md``, ``results.json`` and ``verdict.json``; a run that was stopped
goes on, and ``--episodes`` may grow. ``--model.init_args.warm_start FOLDER`` starts a fit from that table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from modmeta.commands.arguments import Arguments
from modmeta.commands.fit import CommandLine
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError
from modmeta.evaluation.action_grid import log_actions
from modmeta.evaluation.gap_report import report_gap
from modmeta.learners import ModularMetaLearner, load_learner, read_checkpoint
from modmeta.learners.action_table import read_table
from modmeta.learners.checkpoint import check


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the table and the report")
    parser.add_argument("--checkpoint", help="a fitted learner; default: source training and measuring, by the config")
    options, words = parser.parse_known_args()
    try:
        run(options, words)
    except ModmetaError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace, words: list[str]) -> None:
    quiet()
    cli = CommandLine(Arguments.parse(words))
    datamodule = cli.datamodule
    datamodule.setup()
    options.output.mkdir(parents=True, exist_ok=True)
    kept = options.output / "source.ckpt"
    learner = modular(cli.model)
    ready = options.checkpoint or (kept if kept.exists() else None)
    if ready is not None:
        check(read_checkpoint(ready)["modmeta"], learner, weights=False)
        learner = modular(load_learner(ready))
    if not learner.sources.ready:
        measure(learner, datamodule, kept)
    log_actions(learner.eval(), datamodule, options.split, options.episodes, options.output)
    report_gap(read_table(options.output), options.output)


def modular(learner: LightningModule) -> ModularMetaLearner:
    if not isinstance(learner, ModularMetaLearner):
        raise ModmetaError(f"the action grid is one of a ModularMetaLearner, not of a {type(learner).__name__}")
    return learner


def measure(learner: ModularMetaLearner, datamodule: DomainDataModule, kept: Path) -> None:
    """Train the backbone on the sources, where the configuration asks for that, measure them, and keep both."""
    trainer = Trainer(
        accelerator="cpu", max_epochs=learner.source.epochs, logger=False, enable_checkpointing=False,
        num_sanity_val_steps=0, limit_val_batches=0, use_distributed_sampler=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(learner, datamodule=datamodule)
    chunks = datamodule.source_images(learner.source_images)
    batches = ((domain, images, labels) for domain, images, labels, _ in chunks)
    learner.sources.measure(learner.model.backbone, batches, datamodule.classes)
    trainer.save_checkpoint(kept)


if __name__ == "__main__":
    main()
