"""How many images every class of every domain has."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from modmeta.data.audit.survey import Survey

LOPSIDED = 10.0  # largest class over smallest from which on a domain is called unbalanced


@dataclass(frozen=True)
class Balance:
    """Counts of good images.

    Attributes:
        domains: the names of the domains, sorted.
        classes: the names of all classes, sorted.
        counts: by domain and class; what is not there counts 0.
    """

    domains: tuple[str, ...]
    classes: tuple[str, ...]
    counts: Counter[tuple[str, str]]

    def of_domain(self, domain: str) -> dict[str, int]:
        """Return the classes that a domain has good images of, and how many."""
        return {name: self.counts[domain, name] for name in self.classes if self.counts[domain, name]}

    def ratio(self, domain: str) -> float | None:
        """Return how many times as many images the largest class has as the smallest; None without images."""
        counts = self.of_domain(domain).values()
        return max(counts) / min(counts) if counts else None

    def missing(self) -> list[tuple[str, str]]:
        """Return the domains and classes without a single good image, where another domain has the class."""
        return [(domain, name) for domain in self.domains for name in self.classes if not self.counts[domain, name]]


def count_images(survey: Survey) -> Balance:
    """Count the good images of a survey; a class of which all files are quarantined is one with none."""
    inspections = survey.inspections
    return Balance(
        tuple(sorted({inspection.domain for inspection in inspections})),
        tuple(sorted({inspection.class_name for inspection in inspections})),
        Counter((inspection.domain, inspection.class_name) for inspection in inspections if inspection.verdict == "ok"),
    )
