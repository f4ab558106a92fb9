"""Groups of duplicates against a plain comparison of all pairs, and what altered copies must not escape."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from modmeta.data.audit import duplicates
from modmeta.data.audit.descriptor import EDGES, describe


def test_same_groups_rows_by_hash() -> None:
    assert duplicates.same(["a", "b", None, "a", None, "c", "b", "a"]) == [(0, 3, 7), (1, 6)]
    assert duplicates.same([]) == []


def connected(linked: np.ndarray) -> set[tuple[int, ...]]:
    """Return the components of two or more rows, by spreading over the pairs until nothing changes."""
    reach = linked | np.eye(len(linked), dtype=bool)
    while True:
        further = (reach.astype(int) @ reach.astype(int)) > 0
        if (further == reach).all():
            return {tuple(np.flatnonzero(row).tolist()) for row in reach if row.sum() > 1}
        reach = further


@pytest.mark.parametrize("cells", [1, 100, 4_000_000])
def test_near_agrees_with_all_pairs(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_CELLS", cells)
    monkeypatch.setattr(duplicates, "_PAIRS", 7)
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 60, dtype=np.uint64)
    edges = random.normal(size=(60, 20))
    for row in range(30, 60):  # some changed a little, some a lot, in one of the two or in both
        source = random.integers(0, 30)
        for bit in random.choice(64, random.integers(0, 10), replace=False):
            hashes[row] = hashes[source] ^ np.uint64(1 << int(bit))
        edges[row] = edges[source] + random.choice([0.05, 0.5]) * random.normal(size=20)
    edges /= np.linalg.norm(edges, axis=1, keepdims=True)
    linked = np.zeros((60, 60), bool)
    for a in range(60):
        for b in range(60):
            near = (int(hashes[a]) ^ int(hashes[b])).bit_count() <= 6
            linked[a, b] = near and float(edges[a] @ edges[b]) >= 0.97
    expected = connected(linked)
    assert len(expected) > 3
    assert set(duplicates.near(hashes, edges.astype(np.float32))) == expected


def test_a_long_film_of_one_scene_is_one_group() -> None:
    edges = np.full((800, 4), 0.5, np.float32)
    assert duplicates.near(np.zeros(800, np.uint64), edges) == [tuple(range(800))]


def test_images_without_edges_are_nobodys_duplicates() -> None:
    assert duplicates.near(np.zeros(4, np.uint64), np.zeros((4, 576), np.float32)) == []
    assert duplicates.near(np.zeros(0, np.uint64), np.zeros((0, 576), np.float32)) == []


def edges_of(image: Image.Image) -> np.ndarray:
    small = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))
    return describe(small.transpose(2, 0, 1)[None])[0, :EDGES]


def recompressed(image: Image.Image) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=50)
    return Image.open(content)


@pytest.mark.parametrize(
    "change",
    [
        recompressed,
        lambda image: image.resize((80, 80)),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        lambda image: image.convert("L"),
    ],
)
def test_the_edges_of_an_altered_copy_stay(change: object) -> None:
    blocks = np.random.default_rng(3).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize((160, 160), Image.Resampling.BICUBIC)
    other = Image.fromarray(blocks[::-1].copy()).resize((160, 160), Image.Resampling.BICUBIC)
    assert callable(change)
    assert edges_of(image) @ edges_of(change(image)) >= duplicates.MIN_COSINE
    assert edges_of(image) @ edges_of(other) < duplicates.MIN_COSINE


def test_edges_point_where_the_picture_changes() -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    right, down = describe(np.stack([np.stack([ramp] * 3), np.stack([ramp.T] * 3)]))[:, :EDGES].reshape(2, 64, 9)
    assert (right.argmax(axis=1) == 0).all()  # a vertical edge is the first of nine directions
    assert (right[:, 1:] == 0).all()
    assert (down[:, 4] > 0).all()  # 90 degrees lie between the fifth and the sixth
    assert np.allclose(down[:, 4], down[:, 5])
    assert np.allclose(np.linalg.norm([right, down], axis=(1, 2)), 1)
    flat = describe(np.full((1, 3, 64, 64), 90, np.uint8))
    assert torch.isfinite(torch.from_numpy(flat)).all()
    assert (flat[:, :EDGES] == 0).all()
