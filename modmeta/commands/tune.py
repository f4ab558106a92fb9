"""``tune``: fits with varied settings, one after the other, and the best of them as a configuration."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]
from rich.box import SIMPLE_HEAD
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from modmeta.cli import user_message
from modmeta.commands.arguments import Arguments, read_config, read_yaml
from modmeta.commands.fit import CommandLine, starting_point
from modmeta.commands.plugins import resolve_file
from modmeta.commands.quiet import quiet
from modmeta.commands.resume import AUTO, resume
from modmeta.errors import ModmetaError, unknown
from modmeta.evaluation.terminal import console
from modmeta.files import write_atomically

if TYPE_CHECKING:
    from modmeta.search.study import Study, Trial

_SPLIT = "val/"


class _Unbuilt(CommandLine):
    """Parses a configuration and builds nothing."""

    def instantiate_classes(self) -> None:
        """Leave it at the configuration."""


class _OfEveryTrialError(ModmetaError):
    """What no other settings would mend."""


def run(options: argparse.Namespace) -> int:
    """Run the trials that are missing, keep the best configuration, and print all."""
    quiet()
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # once per trial is too often
    if find_spec("optuna") is None:
        raise ModmetaError("tune needs Optuna; install it with pip install 'modmeta[search]'")
    from modmeta.search.space import check_keys, lowest, read_space, with_values
    from modmeta.search.study import Study

    _check(options)
    config = _absolute(read_config(Path(options.config)), Path(options.config), options.modules)
    described = read_yaml(Path(options.space))
    space = read_space(described, options.space)
    full = _full(config)
    check_keys(space, full, options.space)
    _full(with_values(config, full, lowest(space)))  # a value of a wrong type is an error of all trials
    output = Path(options.output).absolute()
    _make(output)
    settings = {"config": config, "space": described, "metric": options.metric}
    study = Study(output / "trials.json", space, settings, options.direction == "maximize", options.seed)

    def keep_best() -> None:
        if study.best is not None:
            best = with_values(config, full, study.best.values)
            _write_config(output / "best.yaml", _about(study.best, options.metric), best)

    keep_best()  # a study that was killed may have had no time to
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(),
                  console=console()) as progress:  # fmt: skip
        bar = progress.add_task("tuning", total=options.trials, completed=len(study.trials))
        while len(study.trials) < options.trials:
            values = study.suggest()
            trial = _try(len(study.trials), values, with_values(config, full, values), options.metric, output)
            study.add(trial)
            keep_best()
            progress.console.print(_line(trial, options.metric), markup=False, highlight=False)
            progress.update(bar, completed=len(study.trials))
    if study.best is None:
        raise ModmetaError(f"all {len(study.trials)} trials failed; the first: {study.trials[0].reason}")
    console().print(_table(study, options.metric))
    print(f"best configuration: {Path(options.output, 'best.yaml')}")
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.trials < 1:
        raise ModmetaError(f"--trials {options.trials} is too small; it must be 1 or more")
    if options.seed < 0:
        raise ModmetaError(f"--seed {options.seed} is too small; it must be 0 or more")
    if not options.metric.startswith(_SPLIT):
        raise ModmetaError(f"--metric {options.metric}: settings are chosen on validation; give a metric {_SPLIT}...")


def _absolute(config: dict[str, Any], path: Path, modules: list[str]) -> dict[str, Any]:
    """Return a configuration that means the same wherever its file lies."""
    named = config.get("modules") or []
    files = [resolve_file(name) for name in modules]
    files += [resolve_file(name, path.parent) for name in (named if isinstance(named, list) else [])]
    return {**config, "modules": [str(file) for file in dict.fromkeys(files)]} if files else config


def _full(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with all defaults and nothing left to resolve; wrong keys and types are refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        parsed = _Unbuilt(Arguments.parse(["--config", str(path)]))
    return dict(yaml.safe_load(parsed.parser.dump(parsed.config, skip_none=False)))


def _try(number: int, values: dict[str, Any], config: dict[str, Any], metric: str, output: Path) -> Trial:
    from modmeta.search.study import Trial

    folder = output / "trials" / f"{number:04d}"
    begin = time.perf_counter()
    try:
        result = _fit(folder, config, metric)
        if math.isfinite(result):
            return Trial(number, values, result, seconds=time.perf_counter() - begin)
        reason = f"{metric} is {result}"
    except _OfEveryTrialError:
        raise
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        reason = message
    finally:
        gc.collect()  # a model that Lightning still refers to would crowd out the next one
    return Trial(number, values, None, reason, time.perf_counter() - begin)


def _fit(folder: Path, config: dict[str, Any], metric: str) -> float:
    """Fit a configuration, or go on with a fit of it that was stopped, and return the metric of what came of it."""
    resumed = resume(AUTO, folder) if folder.exists() else None
    _make(folder)
    _write_config(folder / "trial.yaml", "", config)
    words = ["--config", str(folder / "trial.yaml"), "--name", folder.name, "--trainer.enable_progress_bar", "false"]
    cli = _fit_in(folder.parent)(replace(Arguments.parse(words), resumed=resumed))
    if cli.trainer.world_size > 1:
        raise _OfEveryTrialError("tune runs its trials in one process; set trainer.devices to 1")
    checkpoint = starting_point(cli, fits=True)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    # The learner's last word: some of what it is made of comes after the last validation of a fit.
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    logged = {name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith(_SPLIT)}
    if not logged:
        raise ModmetaError("nothing was validated: source training took all epochs, or validation is switched off")
    if metric not in logged:
        raise _OfEveryTrialError(str(unknown("metric", metric, logged)))
    return logged[metric]


def _fit_in(folder: Path) -> type[CommandLine]:
    return type("TrialCommandLine", (CommandLine,), {"runs": folder})


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModmetaError(f"output: cannot make the folder {folder} ({error.strerror}); choose another") from error


def _write_config(path: Path, about: str, config: dict[str, Any]) -> None:
    write_atomically(path, (about + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)).encode())


def _about(trial: Trial, metric: str) -> str:
    return (
        f"# The best settings that modmeta tune has found: trial {trial.number},\n"
        f"# with {metric} {trial.result:.6g} on the validation episodes that they were chosen on.\n"
    )


def _line(trial: Trial, metric: str) -> str:
    came = f"failed: {trial.reason}" if trial.result is None else f"{metric} {trial.result:.4f}"
    return f"trial {trial.number}: {_shown(trial)}: {came} ({trial.seconds:.0f} s)"


def _shown(trial: Trial) -> str:
    return ", ".join(f"{key.rpartition('init_args.')[2]} {_brief(value)}" for key, value in trial.values.items())


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _table(study: Study, metric: str) -> Table:
    table = Table(title=f"{len(study.trials)} trials", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("trial", justify="right")
    table.add_column(metric, justify="right")
    for key in study.space:
        table.add_column(Text(key.rpartition("init_args.")[2]), justify="right")
    sign = -1.0 if study.maximize else 1.0
    for trial in sorted(study.trials, key=lambda t: math.inf if t.result is None else sign * t.result):
        result = "failed" if trial.result is None else f"{trial.result:.4f}"
        values = [Text(_brief(value)) for value in trial.values.values()]
        table.add_row(str(trial.number), result, *values, style="bold" if trial is study.best else None)
    return table
