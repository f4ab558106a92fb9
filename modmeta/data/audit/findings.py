"""What is wrong with a folder, and how badly: one line for each kind of problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from modmeta.data.audit.audit import Audit
from modmeta.data.audit.balance import LOPSIDED, Balance
from modmeta.data.audit.duplicates import Group

_NAMED = 6  # members of a group of duplicates that are named


@dataclass(frozen=True)
class Finding:
    """One kind of problem.

    Attributes:
        kind: its name, for programs.
        severity: an error must be mended before the folder is used, a warning should be looked at, a note only says
            something.
        title: its name, for people.
        cases: what it concerns, one line each.
    """

    kind: str
    severity: Literal["error", "warning", "note"]
    title: str
    cases: tuple[str, ...]

    @property
    def line(self) -> str:
        """The title and the number of cases."""
        return f"{self.title}: {len(self.cases):,}"


def find_problems(audit: Audit, counts: Balance, suspects: int) -> list[Finding]:
    """Return all kinds of problems that a folder has, errors first.

    Args:
        audit: what is known of the folder.
        counts: its images.
        suspects: how many suspicious labels to name at most.
    """
    found = [*_errors(audit), *_warnings(audit, counts), *_notes(audit, suspects)]
    return [finding for finding in found if finding.cases]


def _errors(audit: Audit) -> list[Finding]:
    survey = audit.survey
    bad = tuple(f"{each.relative} {each.reason}" for each in survey.inspections if each.verdict == "quarantined")
    conflicts = _names(audit, audit.conflicting(audit.copies))
    return [
        Finding("folders", "error", "folders that cannot be used", survey.faults),
        Finding("quarantined", "error", "image files that cannot be used", bad),
        Finding("conflicting_labels", "error", "groups of images with the same pixels under two labels", conflicts),
    ]


def _warnings(audit: Audit, counts: Balance) -> list[Finding]:
    skipped = tuple(f"{each.relative} {each.reason}" for each in audit.survey.skipped)
    missing = tuple(f"{domain} has no usable image of {name}" for domain, name in counts.missing())
    single = tuple(f"{domain}/{name}" for (domain, name), count in sorted(counts.counts.items()) if count == 1)
    ratios = [(domain, counts.ratio(domain)) for domain in counts.domains]
    uneven = tuple(f"{domain}: {ratio:.0f} to 1" for domain, ratio in ratios if ratio is not None and ratio >= LOPSIDED)
    conflicts = audit.conflicting(audit.near)
    near = [group for group in audit.near if group not in conflicts]
    copies = [group for group in audit.copies if len({audit.label(row) for row in group}) == 1]
    return [
        Finding(
            "near_conflicts", "warning", "groups of nearly the same images under two labels", _names(audit, conflicts)
        ),
        Finding("copies", "warning", "groups of images with the same pixels", _names(audit, copies)),
        Finding("near_duplicates", "warning", "groups of nearly the same images", _names(audit, near)),
        Finding("missing_classes", "warning", "classes that a domain has no image of", missing),
        Finding("single_images", "warning", "classes with a single image", single),
        Finding("imbalance", "warning", f"domains with a class {LOPSIDED:.0f} times as large as another", uneven),
        Finding("skipped", "warning", "entries that were passed over", skipped),
    ]


def _notes(audit: Audit, suspects: int) -> list[Finding]:
    total = Counter(note for each in audit.survey.inspections for note in each.notes)
    return [
        Finding("suspicious_labels", "note", "labels worth a look, the most suspicious first",
                tuple(_doubted(audit, row) for row in audit.suspects()[:suspects])),
        Finding("notes", "note", "ways in which images are converted when they are read",
                tuple(f"{note}: {count:,}" for note, count in total.most_common())),
    ]  # fmt: skip


def _names(audit: Audit, groups: Iterable[Group]) -> tuple[str, ...]:
    return tuple(_members([audit.survey.inspections[row].relative for row in group]) for group in groups)


def _members(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return " = ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _doubted(audit: Audit, row: int) -> str:
    doubt = audit.doubts[row]
    assert doubt is not None
    return f"{audit.survey.inspections[row].relative} looks more like {doubt.other} (by {doubt.margin:.2f})"
