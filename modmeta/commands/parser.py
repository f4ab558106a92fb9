"""The parser behind fit, validate and test: strict about keys, brief about errors."""

from __future__ import annotations

from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from modmeta.commands.explain import explain, explain_interpolation


class BriefParser(LightningArgumentParser):
    """Lightning's parser without abbreviations, and with one line for an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # jsonargparse makes a parser of this class for every nested class, too.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line.

        Raises:
            ModmetaError: for anything in it, or in the files it names, that is not accepted.
        """
        try:
            return super().parse_args(*args, **kwargs)
        except OmegaConfBaseException as error:
            raise explain_interpolation(error.full_key, str(error), self._known_keys()) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the user error for what jsonargparse found."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise explain(message, self._known_keys()) from ex

    def _known_keys(self) -> list[str]:
        return list(self.get_defaults(skip_validation=True).keys())
