"""The parser behind fit, validate and test: strict about keys, brief about errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from modmeta.commands.arguments import read_config
from modmeta.commands.explain import explain, explain_interpolation
from modmeta.commands.interpolation import without_environment
from modmeta.commands.known_keys import Key, KnownKeys


class BriefParser(LightningArgumentParser):
    """Lightning's parser without abbreviations, and with one line for an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # jsonargparse makes a parser of this class for every nested class, too.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str], **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line.

        Raises:
            ModmetaError: for anything in it, or in the files it names, that is not accepted.
        """
        # The types of arguments are jsonargparse's own affair, but it has no other way to ask.
        hints = {action.dest: getattr(action, "_typehint", Any) for action in self._actions}
        defaults = self.get_defaults(skip_validation=True)
        known = KnownKeys({name: Key(hints.get(name, Any), defaults[name]) for name in defaults.keys()})  # noqa: SIM118
        for name, value in _options(args):
            if name == "config":
                known.check_file(read_config(Path(value)))
            else:
                known.check_option(name, _plain(value))
        try:
            with without_environment():
                return super().parse_args(list(args), **kwargs)
        except OmegaConfBaseException as error:
            raise explain_interpolation(error.full_key, str(error), self._known_keys()) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the user error for what jsonargparse found."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise explain(message, self._known_keys()) from ex

    def _known_keys(self) -> list[str]:
        return list(self.get_defaults(skip_validation=True).keys())


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the names and values of options."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            yield name, value if given else following


def _plain(value: str) -> Any:
    """Return what the text of an option is, as far as it is YAML."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
