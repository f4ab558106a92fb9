"""``place``: which of a trained supernet's candidate modules to put where, as units that a fit takes."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from rich.box import SIMPLE_HEAD
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from modmeta.adapters import UnitConfig
from modmeta.commands.arguments import read_config
from modmeta.commands.load import load
from modmeta.commands.parser import BriefParser
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError
from modmeta.evaluation.terminal import console
from modmeta.files import write_atomically
from modmeta.learners import SupernetLearner
from modmeta.search.evolution import Evolution
from modmeta.search.placement import Measured, PlacementSearch, chosen_units, validation_episodes

_SHOWN = 5
_PLACES = ("root", "cache_dir", "num_workers")
"""Where images lie and who reads them; what they are is compared by its content."""


def run(options: argparse.Namespace) -> int:
    """Search, or go on with a search, and write the best placement."""
    quiet()
    output, checkpoint = Path(options.output), Path(options.checkpoint)
    record = output.with_suffix(".search.json")
    if output.exists() and not record.exists():
        raise ModmetaError(f"output: {output} exists and is of no search; choose another name")
    learner = load(options)
    if not isinstance(learner, SupernetLearner):
        raise ModmetaError(f"checkpoint {checkpoint} holds a {type(learner).__name__}; place needs a SupernetLearner's")
    settings = _settings(None if options.config is None else Path(options.config), checkpoint)
    data = _data(settings, learner, checkpoint)
    learner.keep_features(data.store, data.hparams["cache_dir"])
    drawn = {key: value for key, value in settings["data"].items() if key not in _PLACES}
    checksum = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    origin = {"checkpoint": checksum, "images": data.store.content, "data": drawn}
    own = {field.name: settings[field.name] for field in dataclasses.fields(Evolution)}
    search = PlacementSearch(
        learner, list(validation_episodes(data)), Evolution(**own), settings["budget"], record, origin
    )
    _run(search)
    best = search.best()
    _write(output, best, chosen_units(learner, best.open), len(search.measured))
    _print(search)
    print(f"units: {output}")
    return 0


def _settings(path: Path | None, checkpoint: Path) -> dict[str, Any]:
    """Return the settings of the search; what they leave out of the data is as in the run of the checkpoint."""
    given = {} if path is None else read_config(path)
    run = checkpoint.absolute().parent.parent / "config.yaml"
    data = (read_config(run).get("data") or {}) if run.is_file() else {}
    parser = BriefParser(parser_mode="omegaconf+", prog="modmeta")
    parser.add_class_arguments(Evolution, instantiate=False)
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_class_arguments(DomainDataModule, "data", instantiate=False)
    own = given.get("data") or {}
    parsed: Namespace = parser.parse_object({**given, "data": {**data, **own} if isinstance(own, dict) else own})
    return dict(parsed.as_dict())


def _data(settings: dict[str, Any], learner: SupernetLearner, checkpoint: Path) -> DomainDataModule:
    data = DomainDataModule(**settings["data"])
    data.setup("fit")
    size = learner.model.backbone.image_size
    if size != data.store.image_size:
        raise ModmetaError(f"checkpoint {checkpoint} is for images of {size} pixels; set data.image_size to that")
    return data


def _run(search: PlacementSearch) -> None:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console()) as progress:
        bar = progress.add_task("placing", total=search.evolution.population * search.evolution.generations)

        def tell(generation: int, done: int, population: int) -> None:
            description = f"generation {generation + 1}/{search.evolution.generations}"
            progress.update(bar, completed=len(search.measured) + done, description=description)

        search.run(tell)
        progress.update(bar, completed=len(search.measured))


def _write(output: Path, best: Measured, units: list[UnitConfig], count: int) -> None:
    assert best.gain is not None
    about = (
        f"# Found by modmeta place: the best of {count} placements on the validation episodes that chose it.\n"
        f"# There it takes {best.gain:.4f} nats off the query loss and changes the accuracy by "
        f"{100 * best.accuracy:+.1f} points.\n"
        f"# Use it on top of a configuration: modmeta fit --config CONFIG.yaml --config {output.name}\n"
    )
    content = {"model": {"init_args": {"units": [_brief(unit) for unit in units]}}}
    write_atomically(output, (about + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)).encode())


def _brief(unit: UnitConfig) -> dict[str, Any]:
    """Return a unit's configuration as plain data, without what is as by default."""
    default = dataclasses.asdict(UnitConfig(unit.module))
    found = {name: value for name, value in dataclasses.asdict(unit).items() if value != default[name]}
    return {"module": unit.module} | {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}


def _print(search: PlacementSearch) -> None:
    found = [each for each in search.measured.values() if each.gain is not None]
    table = Table(title="the best placements", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading, side in (("gain in nats", "right"), ("accuracy", "right"), ("units", "left")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for each in sorted(found, key=lambda each: -(each.gain or 0.0))[:_SHOWN]:
        table.add_row(f"{each.gain:+.4f} ± {each.error:.4f}", f"{100 * each.accuracy:+.1f} %", ", ".join(each.open))
    console().print(table)
    failed = len(search.measured) - len(found)
    console().print(
        f"{len(search.measured)} placements measured, {failed} diverged; ± is the standard error over the episodes, "
        "which the winner was chosen on: it will gain somewhat less on others"
    )
