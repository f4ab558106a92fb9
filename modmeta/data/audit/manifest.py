"""The manifest: one line of JSON for each file, with its hashes and its verdict."""

from __future__ import annotations

import json
from typing import Any

from modmeta.data.audit.audit import Audit


def manifest_lines(audit: Audit) -> bytes:
    """Return the lines, sorted by domain, class and name, and after them the entries that were passed over.

    ``copy_of`` and ``near_copy_of`` name the first image of the group of duplicates that an image belongs to; groups
    never share an image, so that keeping each together keeps duplicates on one side of any split.
    """
    inspections = audit.survey.inspections
    first = {row: group[0] for group in audit.copies for row in group[1:]}
    near = {row: group[0] for group in audit.near for row in group[1:]}
    lines: list[dict[str, Any]] = []
    for row, each in enumerate(inspections):
        doubt = audit.doubts[row]
        lines.append(
            {
                "path": each.relative,
                "domain": each.domain,
                "class": each.class_name,
                "verdict": each.verdict,
                "reason": each.reason,
                "notes": list(each.notes),
                "bytes": each.size,
                "width": each.width,
                "height": each.height,
                "mode": each.mode,
                "sha256": each.bytes_sha256,
                "pixels_sha256": each.pixels_sha256,
                "dhash": None if each.dhash is None else f"{each.dhash:016x}",
                "copy_of": inspections[first[row]].relative if row in first else None,
                "near_copy_of": inspections[near[row]].relative if row in near else None,
                "best_other_label": None if doubt is None else doubt.other,
                "label_doubt": None if doubt is None else round(doubt.margin, 4),
            }
        )
    lines += [{"path": each.relative, "verdict": "skipped", "reason": each.reason} for each in audit.survey.skipped]
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
