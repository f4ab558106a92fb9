"""The parser behind fit, validate and test: its errors are short and offer the nearest right key."""

from __future__ import annotations

from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from modmeta.errors import ModmetaError


class ExplainingParser(LightningArgumentParser):
    """Lightning's parser with errors of a few lines instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the user error for what jsonargparse found."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise ModmetaError(message) from ex
