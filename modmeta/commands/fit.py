"""``fit``, ``validate``, ``test``: Lightning's command line with modmeta's run folder, errors and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.tensorboard import _TENSORBOARD_AVAILABLE

from modmeta.commands.arguments import Arguments
from modmeta.commands.parser import BriefParser
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError
from modmeta.evaluation.results import print_results, write_results
from modmeta.learners import MetaLearner, read_checkpoint

RUNS = "runs"
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

    def __init__(self, arguments: Arguments) -> None:
        self.default_name = arguments.name
        super().__init__(
            LightningModule,
            DomainDataModule,
            subclass_mode_model=True,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=BriefParser,
            # "omegaconf+" resolves interpolations after all files and the command line; "omegaconf" before.
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "modmeta"},
            save_config_kwargs={"overwrite": True},
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
        add("--ckpt_path", type=str | None, default=None, help="Checkpoint to resume or measure.")

    def before_instantiate_classes(self) -> None:
        """Settle the run's name, so that the saved configuration has it."""
        self.config["name"] = self.config["name"] or self.default_name

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with everything that it writes in one folder unless the user says otherwise."""
        given = self.config_init["trainer"]
        folder = Path(RUNS, self.config["name"])
        if given["default_root_dir"] is None:
            kwargs["default_root_dir"] = str(folder)
        if given["logger"] in (None, True):
            kwargs["logger"] = _loggers(folder)
        callbacks = given["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
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
    cli = CommandLine(Arguments.parse(words, beside_checkpoint=command != "fit"))
    checkpoint = cli.config["ckpt_path"]
    _check_checkpoint(checkpoint, cli.model)
    if command == "fit":
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


def _last_epoch() -> ModelCheckpoint:
    # One file that always holds the last finished epoch: a run that diverges leaves a good one behind.
    return ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


def _loggers(folder: Path) -> list[Logger]:
    csv = CSVLogger(folder.parent, folder.name)
    if not _TENSORBOARD_AVAILABLE:
        return [csv]
    return [csv, TensorBoardLogger(folder.parent, folder.name, version=csv.version)]


def _check_checkpoint(path: str | None, model: LightningModule) -> None:
    if path is None or path in _KEYWORDS:
        return
    if isinstance(model, MetaLearner):
        read_checkpoint(path)
    elif not Path(path).is_file():
        raise ModmetaError(f"ckpt_path: the checkpoint {path} does not exist")


def _report(trainer: Trainer, learner: MetaLearner) -> None:
    folder = trainer.log_dir  # asked for on every rank: it is broadcast
    if not trainer.is_global_zero:
        return
    print_results(learner.results)
    if folder is not None and not _is_trial(trainer):
        write_results(Path(folder, "results.json"), learner.results)


def _announce(trainer: Trainer) -> None:
    folder = trainer.log_dir
    if trainer.is_global_zero and folder is not None and not _is_trial(trainer):
        print(f"run folder: {folder}")


def _is_trial(trainer: Trainer) -> bool:
    """Whether this is Lightning's ``fast_dev_run``, which leaves no files behind."""
    return bool(getattr(trainer, "fast_dev_run", False))
