"""The verdicts on a folder's images, kept on disk so that a second start decodes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from modmeta.data.inspect import Inspection
from modmeta.data.scan import ImageFile
from modmeta.files import write_atomically


def read_verdicts(path: Path, files: Sequence[ImageFile]) -> dict[ImageFile, Inspection]:
    """Return the kept inspections of those files that still have the same size and time of change.

    A line that cannot be read is left out, and its file is inspected again.

    Args:
        path: the file of verdicts, which need not exist.
        files: the images as the scanner found them.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    by_name = {file.relative: file for file in files}
    known = {}
    for line in lines:
        try:
            content = json.loads(line)
            changed_ns = content.pop("changed_ns")
            inspection = Inspection(**{**content, "notes": tuple(content["notes"])})
            file = by_name.get(inspection.relative)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        if file is not None and (file.size, file.changed_ns) == (inspection.size, changed_ns):
            known[file] = inspection
    return known


def write_verdicts(path: Path, verdicts: Mapping[ImageFile, Inspection]) -> None:
    """Write one line of JSON for each image whose bytes could be read.

    What kept the others from being read, such as their rights, can change without a trace on the file.

    Raises:
        ModmetaError: if the file cannot be written.
    """
    lines = [
        json.dumps({**asdict(found), "changed_ns": file.changed_ns})
        for file, found in verdicts.items()
        if found.bytes_sha256 is not None
    ]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
