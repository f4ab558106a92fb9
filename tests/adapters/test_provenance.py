"""What a file says of its images: enough to ask for one, and no more than asked for."""

import hashlib
import hmac
import json

import pytest
import torch

from modmeta.adapters.provenance import describe_images, holds_image
from modmeta.errors import ModmetaError

IMAGES = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_an_image_can_be_asked_for() -> None:
    found = describe_images(IMAGES)
    assert all(holds_image(found, image) for image in IMAGES)
    other = IMAGES[0].clone()
    other[0, 0, 0] ^= 1
    assert not holds_image(found, other)
    salt = bytes.fromhex(found["salt"])
    expected = hmac.new(salt, IMAGES[2].numpy().tobytes(), hashlib.sha256).hexdigest()[:32]
    assert expected in found["hashes"]


def test_the_order_of_the_images_does_not_show() -> None:
    assert describe_images(IMAGES) == describe_images(IMAGES.flip(0))


def test_a_shared_image_has_another_hash_in_every_file() -> None:
    one, two = describe_images(IMAGES[:3]), describe_images(IMAGES[1:])
    assert not set(one["hashes"]) & set(two["hashes"])
    assert not {hashlib.sha256(image.numpy().tobytes()).hexdigest()[:32] for image in IMAGES} & set(one["hashes"])


def test_levels_say_what_they_are_called() -> None:
    assert describe_images(IMAGES, "none") == {}
    assert set(describe_images(IMAGES, "hashes", ("x.png",))) == {"salt", "hashes"}
    assert describe_images(IMAGES, "full", ("y.png", "x.png"))["names"] == ["x.png", "y.png"]
    with pytest.raises(ModmetaError, match="one of none, hashes, full, got 'some'"):
        describe_images(IMAGES, "some")


def test_more_images_than_a_header_holds_are_refused() -> None:
    many = torch.zeros(20_001, 1, 1, 1, dtype=torch.uint8)
    with pytest.raises(ModmetaError, match="adapt with --provenance none"):
        describe_images(many)
    assert len(json.dumps(describe_images(many[:-1]))) < 2**20


@pytest.mark.parametrize("provenance", [{}, {"salt": 3, "hashes": []}, {"salt": "xx", "hashes": []}])
def test_a_file_without_hashes_cannot_be_asked(provenance: dict[str, object]) -> None:
    with pytest.raises(ModmetaError):
        holds_image(provenance, IMAGES[0])
