"""Places in a backbone where a module can act, and how to choose among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from modmeta.errors import ModmetaError, unknown

KINDS = ("norm", "conv", "dwconv", "pwconv", "qkv", "proj", "mlp", "block", "features")


@dataclass(frozen=True)
class Site:
    """A place in a backbone where an adapter module can act.

    Attributes:
        name: path of the module in the timm model (``"blocks.3.0.bn1"``); ``"features"`` for the output.
        kind: one of :data:`KINDS`.
        order: position in execution order over all sites.
        depth: the same position as a share, from 0 (first) to 1 (the features).
        stage: index of the stage of constant resolution that it lies in, from 0.
        block: index of the segment between two cuts that it lies in, from 0.
        shapes: shapes of the parameters and float buffers that the module holds itself, by local name;
            empty for ``block`` and ``features``.
        channels: number of channels of its output.
        groups: 1 except for grouped convolutions.
        channel_dim: axis of the channels in its output: 1 for (B, C, H, W) maps, else -1.
        macs: multiply-accumulates of its weight in one forward pass, per image at this image size; of all
            layers inside it for a ``block``.
        called: whether the model calls the module. Where it reads the module's weight instead (timm's
            ``F.linear(x, self.qkv.weight)``), overlays act but slots and observers never would.
        positions: pixels or tokens per image at which it gives its channels, at this image size; 1 or more.
        any_length: whether it is a ``block`` of (B, N, C) tokens that also takes more of them.
    """

    name: str
    kind: str
    order: int
    depth: float
    stage: int
    block: int
    shapes: Mapping[str, tuple[int, ...]] = field(hash=False)
    channels: int
    groups: int
    channel_dim: int
    macs: int
    called: bool = True
    positions: int = 1
    any_length: bool = False


@dataclass(frozen=True)
class Selector:
    """A choice of sites by what they are; an option that is None does not restrict.

    Args:
        kinds: kinds to keep.
        stages: stages to keep.
        depth: lowest and highest depth to keep, both included.
        names: globs of which the site's name must match at least one.

    Raises:
        ModmetaError: if a kind does not exist or the depth range is not within 0..1.
    """

    kinds: tuple[str, ...] | None = None
    stages: tuple[int, ...] | None = None
    depth: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        # Configuration files give lists; a frozen selector must stay hashable.
        for option in ("kinds", "stages", "depth", "names"):
            value = getattr(self, option)
            if value is not None:
                object.__setattr__(self, option, tuple(value))
        for kind in self.kinds or ():
            if kind not in KINDS:
                raise unknown("site kind", kind, KINDS)
        if len(self.depth) != 2 or not 0 <= self.depth[0] <= self.depth[1] <= 1:
            raise ModmetaError(f"depth {self.depth} is not a range; give two numbers with 0 <= low <= high <= 1")

    def matches(self, site: Site) -> bool:
        """Return whether ``site`` is among those meant."""
        return (
            (self.kinds is None or site.kind in self.kinds)
            and (self.stages is None or site.stage in self.stages)
            and self.depth[0] <= site.depth <= self.depth[1]
            and (self.names is None or any(fnmatchcase(site.name, glob) for glob in self.names))
        )

    def select(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """Return the sites meant, in the order given.

        Raises:
            ModmetaError: if none matches; the message lists what there is to choose from.
        """
        sites = tuple(sites)
        chosen = tuple(site for site in sites if self.matches(site))
        if not chosen:
            counts = Counter(site.kind for site in sites)
            kinds = ", ".join(f"{kind} ({counts[kind]})" for kind in KINDS if counts[kind]) or "none"
            stages = ", ".join(str(stage) for stage in sorted({site.stage for site in sites})) or "none"
            asked = {name: value for name, value in vars(self).items() if value is not None}
            raise ModmetaError(f"no site matches {asked}; there are kinds {kinds} and stages {stages}")
        return chosen
