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
from modmeta.commands.resume import AUTO, Resumed, resume
from modmeta.errors import ModmetaError

RUNS = "runs"


@dataclass(frozen=True)
class Arguments:
    """A command line that is ready to be parsed.

    Attributes:
        words: the words to parse.
        name: name of the run, unless a key says otherwise.
        resumed: the run that is to go on, where there is one.
    """

    words: list[str]
    name: str
    resumed: Resumed | None = None

    @classmethod
    def parse(cls, words: list[str], beside_checkpoint: bool = False, may_resume: bool = False) -> Arguments:
        """Import the user's files that the command line and its configuration files name.

        Args:
            words: the command line behind the command.
            beside_checkpoint: whether a checkpoint without any configuration file brings its run's own.
            may_resume: whether ``--resume`` is an option of the command.

        Raises:
            ModmetaError: for files that are missing, broken or not what they should be.
        """
        early, rest = _early_parser(may_resume).parse_known_args(words)
        configs = [Path(config) for config in early.config]
        if not configs and beside_checkpoint and early.ckpt_path:
            # runs/NAME/version_N/checkpoints/last.ckpt
            configs = _own_config(Path(early.ckpt_path).parent.parent)
        resumed = None
        if may_resume and early.resume:
            resumed = _resumed(early, configs)
            configs = configs or ([] if resumed is None else _own_config(resumed.folder))
        files = {resolve_file(name): None for name in early.modules}
        for config in configs:
            files |= {resolve_file(name, config.parent): None for name in _modules_of(config)}
        import_files(files)
        front = [word for config in configs for word in ("--config", str(config))]
        for key in ("ckpt_path", "name"):
            if value := getattr(early, key):
                rest += [f"--{key}", value]
        if files:
            rest += ["--modules", json.dumps([str(file) for file in files])]
        return cls(front + ["--help" if word == "--help-all" else word for word in rest], _name(configs), resumed)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, int] = {}
        for key, _ in node.value:
            if key.value in first and isinstance(key, yaml.ScalarNode):
                problem = f"the key {key.value} is given twice, here and in line {first[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                first[key.value] = key.start_mark.line + 1
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


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
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError as error:
        raise ModmetaError(f"config: the file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModmetaError(f"config: the file {path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise ModmetaError(f"config: {path}{where} is no valid YAML: {problem}") from error


def _resumed(early: argparse.Namespace, configs: list[Path]) -> Resumed | None:
    if early.ckpt_path:
        raise ModmetaError("--resume continues a run and --ckpt_path begins a new one; give one of them")
    named = [content["name"] for config in configs if (content := read_config(config)).get("name")]
    name = early.name or (named[-1] if named else _name(configs))
    if early.resume == AUTO and not configs and not early.name:
        raise ModmetaError("--resume auto: which run should go on? Give its configuration or its --name")
    return resume(early.resume, Path(RUNS, name))


def _own_config(folder: Path) -> list[Path]:
    file = folder / "config.yaml"
    return [file] if file.is_file() else []


def _modules_of(config: Path) -> list[str]:
    names = read_config(config).get("modules") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModmetaError(f"modules: {config} should give a list of files, such as [my_module.py]")
    return names


def _early_parser(may_resume: bool) -> argparse.ArgumentParser:
    parser = OneLineParser(prog="modmeta", add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--modules", action="append", default=[])
    parser.add_argument("--ckpt_path")
    parser.add_argument("--name")
    if may_resume:
        parser.add_argument("--resume")
    return parser


def _name(configs: list[Path]) -> str:
    return configs[-1].stem if configs else "run"
