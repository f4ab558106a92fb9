"""A compact description of an image that needs no network: the directions of its edges and its colours."""

from __future__ import annotations

import numpy as np

SIZE = 64  # side of the images that are described, in pixels
_CELL = 8
_DIRECTIONS = 9
_COLOUR_GRID = 4
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601: what an image converted to grey has, too
EDGES = (SIZE // _CELL) ** 2 * _DIRECTIONS  # so many numbers of a description are about edges, the rest about colours
LENGTH = EDGES + 3 * _COLOUR_GRID**2
# Colours alone mislead between drawing styles; at this factor they have about a quarter of the edges' squared length.
_COLOUR_WEIGHT = 0.3


def describe(images: np.ndarray) -> np.ndarray:
    """Return histograms of edge directions and mean colours, both over a grid.

    Edges are 9 unsigned directions in 8 x 8 cells, damped by a square root and of unit length in all, or zero in a
    flat image (Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection", CVPR 2005, without their
    overlapping blocks).

    Args:
        images: ``(n, 3, 64, 64)``, uint8.

    Returns:
        ``(n, 624)``, float32: 576 numbers about edges, 48 about colours.
    """
    x = images.astype(np.float32) / 255
    return np.concatenate([_edges(np.tensordot(_GREY, x, axes=(0, 1))), _colours(x)], axis=1)


def _edges(grey: np.ndarray) -> np.ndarray:
    down, right = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(right, down)
    place = np.arctan2(down, right) % np.pi / np.pi * _DIRECTIONS
    lower = np.floor(place)
    upper_share = place - lower
    lower = lower.astype(np.int64) % _DIRECTIONS
    upper = (lower + 1) % _DIRECTIONS
    count, cells = len(grey), SIZE // _CELL
    histograms = []
    for direction in range(_DIRECTIONS):
        votes = strength * ((lower == direction) * (1 - upper_share) + (upper == direction) * upper_share)
        histograms.append(votes.reshape(count, cells, _CELL, cells, _CELL).sum(axis=(2, 4)))
    flat = np.sqrt(np.stack(histograms, axis=-1)).reshape(count, -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _colours(x: np.ndarray) -> np.ndarray:
    block = SIZE // _COLOUR_GRID
    means = x.reshape(len(x), 3, _COLOUR_GRID, block, _COLOUR_GRID, block).mean(axis=(3, 5))
    return _COLOUR_WEIGHT * (means.reshape(len(x), -1) - 0.5)
