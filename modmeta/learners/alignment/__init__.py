"""Alignments: what source training minimises, beside the mean risk, so that domains agree."""

from modmeta.learners.alignment import coral, dann, group_dro, irm, mixup, mmd, vrex  # noqa: F401 - they register
from modmeta.learners.alignment.alignment import (
    ALIGNMENTS,
    Alignment,
    AlignmentConfig,
    Penalty,
    SourceOutputs,
    register_alignment,
)

__all__ = [
    "ALIGNMENTS",
    "Alignment",
    "AlignmentConfig",
    "Penalty",
    "SourceOutputs",
    "register_alignment",
]
