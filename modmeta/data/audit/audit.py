"""What a folder's images say about each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modmeta.data.audit import duplicates
from modmeta.data.audit.descriptor import EDGES
from modmeta.data.audit.duplicates import Group
from modmeta.data.audit.survey import Survey
from modmeta.data.audit.suspicion import Doubt, doubts


@dataclass(frozen=True)
class Audit:
    """A survey and what follows from it; rows count the survey's inspections.

    Attributes:
        survey: what was found.
        copies: groups of images with the same pixels.
        near: groups of images that are nearly the same, each set of copies represented by its first.
        doubts: for each inspection how much the label is in doubt; None if it is quarantined or nothing can be said.
        features: what the doubts are computed from, in words.
    """

    survey: Survey
    copies: tuple[Group, ...]
    near: tuple[Group, ...]
    doubts: tuple[Doubt | None, ...]
    features: str

    def label(self, row: int) -> str:
        """Return the label of an image."""
        return self.survey.inspections[row].class_name

    def conflicting(self, groups: tuple[Group, ...]) -> list[Group]:
        """Return the groups whose images have two or more labels."""
        return [group for group in groups if len({self.label(row) for row in group}) > 1]

    def suspects(self) -> list[int]:
        """Return the rows that another label fits better than their own, the most suspicious first."""
        found = [(doubt.margin, row) for row, doubt in enumerate(self.doubts) if doubt is not None and doubt.margin > 0]
        return [row for _, row in sorted(found, key=lambda each: (-each[0], each[1]))]


def examine(survey: Survey, features: np.ndarray | None = None, features_name: str = "") -> Audit:
    """Compare the images of a survey with each other.

    Args:
        survey: what was found.
        features: ``(n, D)`` of the survey's good images, to judge labels by; None for its descriptors.
        features_name: what the features are, in words.
    """
    inspections = survey.inspections
    copies = duplicates.same([inspection.pixels_sha256 for inspection in inspections])
    repeated = {row for group in copies for row in group[1:]}
    place = np.array([row not in repeated for row in survey.good], bool)
    rows = survey.good[place]
    hashes = np.array([inspections[row].dhash for row in rows], np.uint64)
    near = [tuple(rows[list(group)].tolist()) for group in duplicates.near(hashes, survey.descriptors[place, :EDGES])]
    judged: list[Doubt | None] = [None] * len(inspections)
    found = doubts(
        survey.descriptors if features is None else features,
        [inspections[row].domain for row in survey.good],
        [inspections[row].class_name for row in survey.good],
    )
    for row, doubt in zip(survey.good, found, strict=True):
        judged[row] = doubt
    name = "edges and colours" if features is None else features_name
    return Audit(survey, tuple(copies), tuple(near), tuple(judged), name)
