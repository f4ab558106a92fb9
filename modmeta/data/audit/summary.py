"""The summary of a check as plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from modmeta.data.audit.audit import Audit
from modmeta.data.audit.balance import Balance
from modmeta.data.audit.findings import Finding


def summarise(audit: Audit, counts: Balance, found: Sequence[Finding], manifest: bytes) -> dict[str, Any]:
    """Return what ``check.json`` holds.

    Args:
        audit: what is known of the folder.
        counts: its images.
        found: its problems.
        manifest: the lines of its manifest, whose checksum ties the two files together.
    """
    survey = audit.survey
    errors = [finding for finding in found if finding.severity == "error"]
    return {
        "folder": str(survey.folder),
        "layout": "class/image" if survey.single else "domain/class/image",
        "clean": not errors,
        "files": len(survey.inspections),
        "good": len(survey.good),
        "quarantined": len(survey.inspections) - len(survey.good),
        "skipped": len(survey.skipped),
        "domains": {
            domain: {
                "images": sum(counts.of_domain(domain).values()),
                "largest_to_smallest": counts.ratio(domain),
                "classes": {name: counts.counts[domain, name] for name in counts.classes},
            }
            for domain in counts.domains
        },
        "findings": [
            {"kind": each.kind, "severity": each.severity, "title": each.title, "count": len(each.cases),
             "cases": list(each.cases)}
            for each in found
        ],
        "labels_judged_by": audit.features,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }  # fmt: skip
