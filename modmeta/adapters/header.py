"""The header of a safetensors file that someone else wrote: read with distrust, and refused in one line."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from modmeta.errors import ModmetaError

MAX_HEADER = 2**20
_MAX_SHOWN = 200


def read_header(file: Path, stream: BinaryIO) -> dict[str, Any]:
    """Return the header at the beginning of a file, and leave the stream where the tensors begin.

    Args:
        file: its path, for messages.
        stream: its bytes.

    Raises:
        ModmetaError: if these are not the first bytes of a safetensors file with a header of sound size.
    """
    first = stream.read(8)
    length = int.from_bytes(first, "little")
    text = stream.read(length) if len(first) == 8 and length <= MAX_HEADER else b""
    if len(first) < 8 or len(text) < length:
        pickled = first.startswith((b"PK", b"\x80"))
        refuse(file, "it is a pickled file, which may hold code" if pickled else "it is no safetensors file")
    return parse(file, text)


def parse(file: Path, text: bytes) -> dict[str, Any]:
    """Return a JSON object with unique keys, finite numbers and valid text.

    Raises:
        ModmetaError: if it is anything else.
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        refuse(file, f"its header is no valid JSON ({error})")
    if not isinstance(found, dict):
        refuse(file, "its header is malformed")
    return found


def canonical(data: Any) -> str:
    """Return the one JSON text that stands for ``data``.

    Raises:
        ValueError: if it holds a number that is not finite.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def checksum(data: Any) -> str:
    """Return ``"sha256:..."`` of plain data."""
    return f"sha256:{hashlib.sha256(canonical(data).encode()).hexdigest()}"


def shown(value: Any) -> str:
    """Return what a message may show of a value from a file: printable, in one line, and short."""
    text = str(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: _MAX_SHOWN + 1])
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def refuse(file: Path, why: str) -> NoReturn:
    """Raise the error that says why a file is not taken."""
    raise ModmetaError(f"adapter file {file} is refused: {shown(why)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value
