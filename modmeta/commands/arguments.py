"""What must be known of a command line before it is parsed: its files and the user's own code."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from modmeta.commands.options import OneLineParser
from modmeta.commands.plugins import import_files, resolve_file
from modmeta.errors import ModmetaError


@dataclass(frozen=True)
class Arguments:
    """A command line that is ready to be parsed.

    Attributes:
        words: the words to parse.
        name: name of the run, unless a key says otherwise.
    """

    words: list[str]
    name: str

    @classmethod
    def parse(cls, words: list[str], beside_checkpoint: bool = False) -> Arguments:
        """Import the user's files that the command line and its configuration files name.

        Args:
            words: the command line behind the command.
            beside_checkpoint: whether a checkpoint without any configuration file brings its run's own.

        Raises:
            ModmetaError: for files that are missing, broken or not what they should be.
        """
        early, rest = _early_parser().parse_known_args(words)
        configs = [Path(config) for config in early.config]
        if not configs and beside_checkpoint and early.ckpt_path:
            # runs/NAME/version_N/checkpoints/last.ckpt
            own = Path(early.ckpt_path).parent.parent / "config.yaml"
            configs = [own] if own.is_file() else []
        files = {resolve_file(name): None for name in early.modules}
        for config in configs:
            files |= {resolve_file(name, config.parent): None for name in _modules_of(config)}
        import_files(files)
        front = [word for config in configs for word in ("--config", str(config))]
        if early.ckpt_path:
            rest += ["--ckpt_path", early.ckpt_path]
        if files:
            rest += ["--modules", json.dumps([str(file) for file in files])]
        return cls(front + ["--help" if word == "--help-all" else word for word in rest], _name(configs))


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        ModmetaError: if it is missing, no YAML, or no mapping of keys.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ModmetaError(f"config: {path} holds no keys; see configs/quickstart.yaml for an example")
    return content


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain data.

    Raises:
        ModmetaError: if it is missing or no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModmetaError(f"config: the file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModmetaError(f"config: the file {path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise ModmetaError(f"config: {path}{where} is no valid YAML: {problem}") from error


def _modules_of(config: Path) -> list[str]:
    names = read_config(config).get("modules") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModmetaError(f"modules: {config} should give a list of files, such as [my_module.py]")
    return names


def _early_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="modmeta", add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--modules", action="append", default=[])
    parser.add_argument("--ckpt_path")
    return parser


def _name(configs: list[Path]) -> str:
    return configs[-1].stem if configs else "run"
