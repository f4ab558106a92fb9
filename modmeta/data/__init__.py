"""Images, domains, episodes and simulated shifts."""

from modmeta.data.attributes import ClassAttributes, read_attributes
from modmeta.data.cache import RowCache
from modmeta.data.datamodule import DomainDataModule
from modmeta.data.digits import DigitsDomains
from modmeta.data.episode import Episode, SourceBatch
from modmeta.data.folders import DomainFolder
from modmeta.data.images import ImageStore
from modmeta.data.shifts import SHIFTS, apply_shift, register_shift

__all__ = (
    "SHIFTS",
    "ClassAttributes",
    "DigitsDomains",
    "DomainDataModule",
    "DomainFolder",
    "Episode",
    "ImageStore",
    "RowCache",
    "SourceBatch",
    "apply_shift",
    "read_attributes",
    "register_shift",
)
