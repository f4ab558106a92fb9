"""Frozen episodes are the data module's, survive the disk, and refuse other images."""

import dataclasses
import json
from pathlib import Path

import compared
import numpy as np
import pytest
import torch
from PIL import Image

from modmeta.data import DigitsDomains, DomainDataModule, DomainFolder
from modmeta.errors import ModmetaError
from modmeta.evaluation.compare import draw_manifest, read_manifest


def test_the_episodes_are_those_of_the_data_module(digits: DigitsDomains) -> None:
    comparison = compared.settings()
    modules = compared.modules(digits, comparison)
    found = draw_manifest(modules)
    places = found.select(comparison.domains, comparison.shots, comparison.episodes)
    assert len(places) == len(found.places) == 12
    for place in places:
        assert not set(place.support) & set(place.query)
        index = place.draw * len(comparison.shots) + comparison.shots.index(place.shots)
        expected = modules[place.domain].episode("test", index)
        episode = place.episode(digits)
        assert episode.index == place.draw
        for field in dataclasses.fields(episode):
            if field.name != "index":
                one, other = getattr(episode, field.name), getattr(expected, field.name)
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_a_manifest_survives_the_disk(digits: DigitsDomains, tmp_path: Path) -> None:
    found = compared.manifest(digits, compared.settings())
    found.write(tmp_path / "episodes.json")
    assert read_manifest(tmp_path / "episodes.json") == found
    found.check(digits)


def test_more_draws_keep_the_first(digits: DigitsDomains) -> None:
    few, many = compared.settings(), compared.settings(episodes=5)
    wanted = few.domains, few.shots, few.episodes
    assert compared.manifest(digits, many).select(*wanted) == compared.manifest(digits, few).select(*wanted)
    with pytest.raises(ModmetaError, match="the manifest has no episode 3 of domain 'neon' with 1 shots"):
        compared.manifest(digits, few).select(few.domains, few.shots, 5)


def paint(root: Path, value: int = 1) -> DomainDataModule:
    """Write images, one of them of a value, and return a data module on them."""
    for domain in ("a", "b"):
        for name in ("cat", "dog"):
            folder = root / domain / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                shade = 40 * number + 5 * (name == "dog") + (domain == "b")
                Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(folder / f"{number}.png")
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(root / "b" / "cat" / "0.png")
    small = {"shots": 1, "eval_shots": [1], "queries": 2, "test_episodes": 1, "image_size": 8}
    module = DomainDataModule(str(root), test_domains=["b"], **small)
    module.setup("test")
    return module


def test_a_copy_of_the_images_is_accepted_and_changed_images_are_not(tmp_path: Path) -> None:
    original = paint(tmp_path / "original")
    manifest = draw_manifest({"b": original})
    copy = paint(tmp_path / "copy")
    assert copy.store.key != original.store.key  # other times of change
    manifest.check(copy.store)
    with pytest.raises(ModmetaError, match="are not those that the manifest's episodes were drawn from"):
        manifest.check(paint(tmp_path / "changed", 200).store)
    for path in (tmp_path / "copy" / "b").rglob("2.png"):
        path.unlink()
    with pytest.raises(ModmetaError, match="are not those that the manifest's episodes were drawn from"):
        manifest.check(DomainFolder(tmp_path / "copy", 8))


def test_another_image_size_is_refused(digits: DigitsDomains) -> None:
    manifest = compared.manifest(digits, compared.settings(episodes=1))
    with pytest.raises(ModmetaError, match="for images of 32 pixels, and data"):
        manifest.check(DigitsDomains(16))


def overlap(content: dict) -> None:
    content["episodes"][0]["support"][0] = content["episodes"][0]["query"][0]


def missing(content: dict) -> None:
    content["episodes"][0]["support"].pop()


def negative(content: dict) -> None:
    content["episodes"][0]["support"][0] = -1


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (overlap, "has an image in both support and query"),
        (missing, "has the wrong number of images"),
        (negative, "has rows that are none"),
        (lambda content: content.pop("key"), "is damaged"),
        (lambda content: content.update(format=9), "is no manifest of episodes of format 1"),
    ],
)
def test_a_manifest_that_cannot_be(edit, expected: str, digits: DigitsDomains, tmp_path: Path) -> None:
    path = tmp_path / "episodes.json"
    compared.manifest(digits, compared.settings(episodes=1)).write(path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ModmetaError, match=expected):
        read_manifest(path)


def test_a_manifest_that_is_missing_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match="does not exist"):
        read_manifest(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ModmetaError, match="cannot be read"):
        read_manifest(tmp_path / "text.json")
