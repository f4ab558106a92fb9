"""``fit``, ``validate``, ``test``: Lightning's command line with modmeta's run folder, errors and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.tensorboard import _TENSORBOARD_AVAILABLE
from lightning.pytorch.plugins import CheckpointIO

from modmeta.commands.arguments import RUNS, Arguments
from modmeta.commands.image_record import ImageRecord
from modmeta.commands.parser import BriefParser
from modmeta.commands.quiet import quiet
from modmeta.commands.resume import Resumed
from modmeta.commands.run_folder import MetricsLogger, SavedConfig, refuse_unwritable
from modmeta.commands.same_run import RunRecord, refuse_other_config
from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError, refuse_outside
from modmeta.evaluation.results import print_results, write_results
from modmeta.learners import AtomicCheckpointIO, MetaLearner, read_checkpoint
from modmeta.learners.checkpoint import check
from modmeta.learners.checkpoint_io import load_plain
from modmeta.learners.interruption import Interruption
from modmeta.learners.source import datamodule_of

TRAINER_DEFAULTS: dict[str, Any] = {
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the data module shards its episodes itself
    "enable_model_summary": False,
    "log_every_n_steps": 10,
}
_KEYWORDS = ("best", "last", "hpc")


class CommandLine(LightningCLI):
    """Builds learner, data and trainer from configuration files and the command line.

    One flat set of keys serves ``fit``, ``validate`` and ``test``, so that each accepts what another saved.
    """

    runs = Path(RUNS)
    """The folder of all runs."""

    def __init__(self, arguments: Arguments) -> None:
        self.default_name = arguments.name
        self.resumed = arguments.resumed
        super().__init__(
            LightningModule,
            DomainDataModule,
            subclass_mode_model=True,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=BriefParser,
            # "omegaconf+" resolves interpolations after all files and the command line; "omegaconf" before.
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "modmeta"},
            save_config_callback=SavedConfig,
            auto_configure_optimizers=False,
            # Learners save their arguments as plain data themselves.
            load_from_checkpoint_support=False,
            args=arguments.words,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys that belong to the run as a whole."""
        add = parser.add_argument
        add("--name", type=str | None, default=None, help="The run lies in runs/NAME/version_N.")
        add("--modules", type=list[str], default=[], help="Python files with modules or learners.")
        add("--test_after_fit", type=bool, default=False, help="Test at the end of a fit.")
        add("--ckpt_path", type=str | None, default=None, help="Checkpoint to begin from or to measure.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and refuse what no type could."""
        super().parse_arguments(parser, args)
        seed, name = self.config["seed_everything"], self.config["name"]
        if type(seed) is int:
            refuse_outside({"seed_everything": seed}, 0, 2**32 - 1)
        if name and (name in (".", "..") or not name.isprintable() or set(name) & set("/\\")):
            raise ModmetaError(f"name: {name!r} is not the name of one folder; give one without slashes")

    def before_instantiate_classes(self) -> None:
        """Settle the run's name, so that the saved configuration has it."""
        self.config["name"] = self.config["name"] or self.default_name
        if self.resumed is not None:
            self.config["name"] = self.resumed.folder.parent.name

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with everything that it writes in one folder unless the user says otherwise."""
        given = self.config_init["trainer"]
        folder = Path(self.runs, self.config["name"]) if self.resumed is None else self.resumed.folder.parent
        if given["default_root_dir"] is None:
            kwargs["default_root_dir"] = str(folder)
        if given["logger"] in (None, True):
            kwargs["logger"] = _loggers(folder, self.resumed)
        elif self.resumed is not None:
            raise ModmetaError("--resume continues a run folder, which has its own loggers; leave out trainer.logger")
        plugins = given["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        callbacks = given["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        callbacks = kwargs["callbacks"] = [*callbacks, Interruption(), ImageRecord()]
        if given["enable_checkpointing"] is not False and not any(
            isinstance(callback, Checkpoint) for callback in callbacks
        ):
            kwargs["callbacks"] = [*callbacks, _last_epoch()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModmetaError(f"trainer: {error}") from error


def run(command: str, words: list[str]) -> int:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        command: which of them.
        words: the command line behind it.
    """
    quiet()
    fits = command == "fit"
    cli = CommandLine(Arguments.parse(words, beside_checkpoint=not fits, may_resume=fits))
    checkpoint = starting_point(cli, fits)
    if fits:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        if not cli.config["test_after_fit"]:
            _announce(cli.trainer)
            return 0
        checkpoint = None
    measure = cli.trainer.validate if command == "validate" else cli.trainer.test
    measure(
        cli.model,
        datamodule=cli.datamodule,
        ckpt_path=checkpoint,
        weights_only=True,
        verbose=not isinstance(cli.model, MetaLearner),
    )
    if isinstance(cli.model, MetaLearner):
        _report(cli.trainer, cli.model)
    _announce(cli.trainer)
    return 0


def starting_point(cli: CommandLine, fits: bool) -> str | None:
    """Return the checkpoint to start from, if there is one, and refuse one that is not for this configuration.

    Args:
        cli: the command line; what is to be trained is prepared to be compared with its checkpoints.
        fits: whether it is to be trained, or measured.
    """
    checkpoint: str | None = cli.config["ckpt_path"] if cli.resumed is None else str(cli.resumed.checkpoint)
    found = _read(checkpoint, cli.model)
    if fits:
        config = cli.parser.dump(cli.config, skip_none=False)
        if found is not None:
            refuse_other_config(found, config)
        cli.trainer.callbacks.insert(0, RunRecord(config, found))  # type: ignore[attr-defined]
        if not _is_trial(cli.trainer):
            refuse_unwritable(Path(cli.trainer.default_root_dir))
    if found is not None and isinstance(cli.model, MetaLearner):
        check(found["modmeta"], cli.model, weights=True)
    return checkpoint


def _last_epoch() -> ModelCheckpoint:
    # One file that always holds the last finished epoch: a run that diverges leaves a good one behind.
    return ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


def _loggers(folder: Path, resumed: Resumed | None) -> list[Logger]:
    version, steps = (None, None) if resumed is None else (resumed.version, resumed.steps)
    metrics = MetricsLogger(folder.parent, folder.name, version, steps)
    if not _TENSORBOARD_AVAILABLE:
        return [metrics]
    return [metrics, TensorBoardLogger(folder.parent, folder.name, version=metrics.version, purge_step=steps)]


def _read(path: str | None, model: LightningModule) -> dict[str, Any] | None:
    if path is None:
        return None
    if path in _KEYWORDS:
        raise ModmetaError(f"ckpt_path: {path} names no file; give one, or go on with a fit by --resume auto")
    return read_checkpoint(path) if isinstance(model, MetaLearner) else load_plain(path)


def _report(trainer: Trainer, learner: MetaLearner) -> None:
    folder = trainer.log_dir  # asked for on every rank: it is broadcast
    if not trainer.is_global_zero:
        return
    print_results(learner.results)
    store = getattr(datamodule_of(learner), "store", None)
    if store is not None and store.quarantined:
        print(f"images that could not be used and were left out: {len(store.quarantined)}; images.json names them")
    if folder is not None and not _is_trial(trainer):
        write_results(Path(folder, "results.json"), learner.results)


def _announce(trainer: Trainer) -> None:
    folder = trainer.log_dir
    if trainer.is_global_zero and folder is not None and not _is_trial(trainer):
        print(f"run folder: {folder}")


def _is_trial(trainer: Trainer) -> bool:
    """Whether this is Lightning's ``fast_dev_run``, which leaves no files behind."""
    return bool(getattr(trainer, "fast_dev_run", False))
