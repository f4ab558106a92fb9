"""Which of the inspected images are used: good ones, each once, under one label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from modmeta.data.inspect import Inspection


@dataclass(frozen=True)
class Screened:
    """What remains of a folder, and what does not.

    Attributes:
        kept: places in the list of inspections, ascending.
        quarantined: the refused files with their reasons, in the order of the inspections.
        copies: files with the pixels of another of their domain and class, which is kept, and that other one.
        shared: pairs of kept files with the same pixels in two domains.
    """

    kept: tuple[int, ...]
    quarantined: tuple[Inspection, ...]
    copies: tuple[tuple[str, str], ...]
    shared: tuple[tuple[str, str], ...]


def screen(inspections: Sequence[Inspection]) -> Screened:
    """Decide which images are used.

    A file that the inspection quarantined is not. Where a domain has the same pixels under two labels, neither
    label can be trusted and all files with these pixels are quarantined. Of several copies in a class the first
    is used, so that none can be in the support while another is in the query.
    """
    alike: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for place, inspection in enumerate(inspections):
        if inspection.verdict == "ok":
            alike[inspection.domain, inspection.pixels_sha256].append(place)
    refused = {place: found for place, found in enumerate(inspections) if found.verdict != "ok"}
    kept: list[int] = []
    copies: list[tuple[int, int]] = []
    for places in alike.values():
        first = places[0]
        labels = {inspections[place].class_name for place in places}
        if len(labels) == 1:
            kept.append(first)
            copies += [(place, first) for place in places[1:]]
            continue
        for place in places:
            mine = inspections[place]
            other = next(inspections[p] for p in places if inspections[p].class_name != mine.class_name)
            reason = f"has the same pixels as {other.relative}, which has another label"
            refused[place] = replace(mine, verdict="quarantined", reason=reason)
    first_with: dict[str | None, int] = {}
    shared = []
    for place in sorted(kept):
        pixels = inspections[place].pixels_sha256
        if first_with.setdefault(pixels, place) != place:
            shared.append((place, first_with[pixels]))
    return Screened(
        tuple(sorted(kept)),
        tuple(refused[place] for place in sorted(refused)),
        tuple((inspections[one].relative, inspections[other].relative) for one, other in sorted(copies)),
        tuple((inspections[one].relative, inspections[other].relative) for one, other in shared),
    )
