"""Images that are there twice: with the very same pixels, or nearly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_DISTANCE = 6  # of 64 bits
MIN_COSINE = 0.97
_CELLS = 4_000_000  # of the matrix of distances that are in memory at once
_PAIRS = 4096  # pairs whose edges are in memory at once

Group = tuple[int, ...]


def same(hashes: Sequence[str | None]) -> list[Group]:
    """Return the groups of two or more rows with one hash; rows without a hash are in none."""
    rows_of: dict[str, list[int]] = {}
    for row, key in enumerate(hashes):
        if key is not None:
            rows_of.setdefault(key, []).append(row)
    return [tuple(rows) for rows in rows_of.values() if len(rows) > 1]


def near(hashes: np.ndarray, edges: np.ndarray) -> list[Group]:
    """Return the groups of images that are nearly the same, each linked to another one of its group.

    Two images are linked if their difference hashes differ in at most 6 of 64 bits and their edges have a cosine
    of 0.97 or more; the hash alone also matches drawings that only share a white ground. Scaled, recompressed,
    darkened and recoloured copies are found, cropped ones are not, and an image without edges is in no group. All
    hashes are compared with each other, but 64 bits at once and in bounded memory.

    Args:
        hashes: ``(n,)``, uint64, difference hashes.
        edges: ``(n, D)``, of unit length, or zero without edges.

    Returns:
        Groups of two or more rows, in ascending order.
    """
    parent = np.arange(len(hashes))
    height = max(1, _CELLS // max(1, len(hashes)))
    for begin in range(0, len(hashes), height):
        distances = np.bitwise_count(hashes[begin : begin + height, None] ^ hashes[None, begin:])
        rows, columns = np.nonzero(distances <= MAX_DISTANCE)
        rows, columns = rows[columns > rows] + begin, columns[columns > rows] + begin
        for start in range(0, len(rows), _PAIRS):
            a, b = rows[start : start + _PAIRS], columns[start : start + _PAIRS]
            apart = parent[a] != parent[b]  # of many images that are all alike, few pairs need a look
            a, b = a[apart], b[apart]
            alike = np.einsum("nd,nd->n", edges[a], edges[b]) >= MIN_COSINE
            for one, other in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
                low, high = sorted((_root(parent, one), _root(parent, other)))
                parent[high] = low
            while (parent[parent] != parent).any():  # everything points at the first of its group again
                parent = parent[parent]
    return same([str(first) for first in parent])


def _root(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        row = int(parent[row])
    return row
