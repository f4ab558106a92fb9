"""``compare``: any number of systems on the same frozen episodes, and a report of their differences."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ActionConfigFile, Namespace

from modmeta.commands.arguments import Arguments, read_config
from modmeta.commands.image_record import write_image_record
from modmeta.commands.load import load
from modmeta.commands.parser import BriefParser
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError, unknown
from modmeta.evaluation.compare import (
    Comparison,
    Manifest,
    Place,
    RowFile,
    draw_manifest,
    read_manifest,
    run_comparison,
    write_report,
)
from modmeta.evaluation.systems.system import SYSTEMS, System
from modmeta.files import write_atomically
from modmeta.learners import MetaLearner

OUTPUT = "runs/compare"
_OWN_KEYS = {"test_episodes", "eval_shots", "seed"}
"""Arguments of the data module that a comparison has keys of its own for."""
_PACKAGES = ("modmeta", "torch", "timm", "numpy")


def run(words: list[str]) -> int:
    """Run a comparison, or go on with it, and write its report.

    Args:
        words: the command line behind the command.
    """
    quiet()
    comparison, systems, manifest, report_only = read_settings(words)
    assert comparison.output is not None
    folder = Path(comparison.output)
    _refuse_other(folder, comparison)
    if not report_only:
        _measure(comparison, systems, folder, manifest)
    write_report(comparison, list(RowFile(folder / "rows.jsonl").rows.values()), folder)
    print(f"report: {folder / 'report.md'}")
    return 0


def read_settings(words: list[str]) -> tuple[Comparison, dict[str, System], str | None, bool]:
    """Return the settings of a command line, its systems, the manifest to use, and whether only to report.

    Raises:
        ModmetaError: for anything that is not accepted.
    """
    arguments = Arguments.parse(words)
    named = _named_systems(arguments.words)
    parser = BriefParser(parser_mode="omegaconf+", prog="modmeta")
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_argument("--manifest", type=str | None, default=None, help="Episodes of another comparison.")
    parser.add_argument("--report-only", action="store_true", help="Measure nothing.")
    parser.add_class_arguments(Comparison, skip={"data", "systems"}, instantiate=False)
    parser.add_class_arguments(DomainDataModule, "data", skip=_OWN_KEYS, instantiate=False)
    for name, system in named.items():
        parser.add_argument(f"--systems.{name}.system", type=str, default=system)
        parser.add_class_arguments(SYSTEMS.get(system), f"systems.{name}", instantiate=False)
    if not named:
        parser.add_argument("--systems", type=dict[str, Any], default={}, help="What is compared.")
    parsed = parser.parse_args(arguments.words)
    plain = parsed.as_dict()
    manifest, report_only = plain.pop("manifest"), plain.pop("report_only")
    plain.pop("config")
    plain["output"] = plain["output"] or f"{OUTPUT}/{arguments.name}"
    comparison = Comparison(**{"systems": {}, **plain})
    comparison.check()
    return comparison, _build(named, parser.instantiate_classes(parsed)), manifest, report_only


def _named_systems(words: list[str]) -> dict[str, str]:
    """Return the registered name of each system that configuration files and command line name."""
    named: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        key, equals, value = word.partition("=")
        if key in ("-c", "--config"):
            path = value if equals else following
            found = read_config(Path(path)).get("systems") or {}
            if not isinstance(found, dict):
                raise ModmetaError(f"systems: {path} should map names to systems, such as `ridge: {{system: ridge}}`")
            for name, options in found.items():
                if isinstance(options, dict) and isinstance(options.get("system"), str):
                    named[str(name)] = options["system"]
                elif name not in named:
                    raise ModmetaError(f"systems.{name}: the key system is missing; known: {', '.join(SYSTEMS)}")
        elif key.startswith("--systems.") and key.count(".") == 2 and key.endswith(".system"):
            named[key.split(".")[1]] = value if equals else following
    for name, system in named.items():
        if not name.replace("-", "_").isidentifier():
            raise ModmetaError(f"systems: {name!r} is no name; take letters, digits, - and _")
        if system not in SYSTEMS:
            raise unknown("system", system, SYSTEMS, f"systems.{name}")
    return named


def _build(named: Mapping[str, str], built: Namespace) -> dict[str, System]:
    systems = {}
    for name, system in named.items():
        options = vars(built["systems"][name])
        try:
            systems[name] = SYSTEMS.get(system)(**{key: value for key, value in options.items() if key != "system"})
        except ModmetaError as error:
            raise type(error)(f"systems.{name}: {error}") from error
    return systems


def _measure(comparison: Comparison, systems: Mapping[str, System], folder: Path, manifest: str | None) -> None:
    origin = _origin(comparison, folder)
    modules = _data(comparison)
    store = next(iter(modules.values())).store
    _make(folder)
    places = _freeze(comparison, modules, folder, manifest)
    config = yaml.safe_dump(comparison.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "config.yaml", config.encode())
    write_image_record(store, folder)
    write_atomically(folder / "provenance.json", (json.dumps(origin, indent=1) + "\n").encode())

    def learner(domain: str) -> MetaLearner:
        where = {"checkpoint": comparison.checkpoint(domain), "accelerator": comparison.accelerator}
        return load(argparse.Namespace(modules=[], **where))

    run_comparison(comparison, systems, places, store, learner, RowFile(folder / "rows.jsonl"))


def _data(comparison: Comparison) -> dict[str, DomainDataModule]:
    """Return for each test domain a data module that has no other, all with one image store."""
    modules: dict[str, DomainDataModule] = {}
    for domain in comparison.domains:
        own = {"test_domains": [domain], "eval_shots": comparison.shots, "test_episodes": comparison.episodes}
        module = DomainDataModule(**{**comparison.data, **own, "seed": comparison.seed})
        if modules:
            module.store = next(iter(modules.values())).store
        module.setup("test")
        modules[domain] = module
    return modules


def _freeze(
    comparison: Comparison, modules: Mapping[str, DomainDataModule], folder: Path, other: str | None
) -> list[Place]:
    """Return the frozen episodes, drawing only those that no manifest has."""
    own, wanted = folder / "episodes.json", (comparison.domains, comparison.shots, comparison.episodes)
    store = next(iter(modules.values())).store
    stored = read_manifest(own) if own.exists() else None
    if other is not None:
        manifest = read_manifest(other)
        places = manifest.select(*wanted)
    elif stored is not None and len(stored.places) >= len(comparison.domains) * len(comparison.shots) * wanted[2]:
        manifest, places = stored, stored.select(*wanted)
    else:
        manifest = draw_manifest(modules)
        places = manifest.select(*wanted)
    if stored is not None:
        stored.check(store)
        _refuse_other_episodes(stored, places, own)
    if manifest is not stored:
        manifest.check(store)
        dataclasses.replace(manifest, key=store.key).write(own)
    return places


def _refuse_other_episodes(stored: Manifest, places: list[Place], path: Path) -> None:
    new = {(place.domain, place.shots, place.draw): place for place in places}
    for place in stored.places:
        if new.get((place.domain, place.shots, place.draw), place) != place:
            raise ModmetaError(
                f"{path} holds other episodes than those asked for, from draw {place.draw} of domain "
                f"{place.domain!r} on; give the manifest that they came from, or choose another output folder"
            )


def _refuse_other(folder: Path, comparison: Comparison) -> None:
    """Refuse a folder with rows that were measured under other settings."""
    if (folder / "config.yaml").exists():
        comparison.refuse_changes(read_config(folder / "config.yaml"))
    elif (folder / "rows.jsonl").exists():
        raise ModmetaError(f"{folder} holds rows without the config.yaml that they belong to; choose another folder")


def _origin(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Return what rows come from, besides the settings; that of the first run, where there was one.

    Raises:
        ModmetaError: if a checkpoint is not the one that rows were measured with.
    """
    digests = {path: _digest(path) for path in {comparison.checkpoint(domain) for domain in comparison.domains}}
    checkpoints = {domain: digests[comparison.checkpoint(domain)] for domain in comparison.domains}
    path = folder / "provenance.json"
    if not path.exists():
        versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
        return {"checkpoints": checkpoints, "versions": versions}
    found = json.loads(path.read_text())
    for domain, digest in checkpoints.items():
        if found["checkpoints"].get(domain) != digest:
            raise ModmetaError(
                f"checkpoint {comparison.checkpoint(domain)} is not the file that the rows of domain {domain!r} in "
                f"{folder} were measured with; choose another output folder"
            )
    return found


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModmetaError(f"checkpoint {path} cannot be read ({error.strerror}); give another one") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModmetaError(f"output: cannot make the folder {folder} ({error.strerror}); choose another") from error
