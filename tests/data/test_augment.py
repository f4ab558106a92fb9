import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modmeta.data import DomainDataModule
from modmeta.data.augment import AUGMENTED, deform
from modmeta.errors import ModmetaError


def noise(count: int, side: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


def small(augment: float) -> DomainDataModule:
    data = DomainDataModule(
        image_size=16, ways=3, shots=2, eval_shots=[2], queries=2, shift_share=0.0, test_domains=["paper"],
        test_episodes=2, augment=augment,
    )  # fmt: skip
    data.setup()
    return data


def test_no_strength_changes_nothing() -> None:
    images = noise(3, 9)
    assert torch.equal(deform(images, 0.0, np.random.default_rng(0)), images)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 40), st.floats(0, 1), st.integers(0, 2**32))
def test_any_size_and_strength_keeps_shape_range_and_what_is_uniform(side: int, strength: float, seed: int) -> None:
    images = torch.cat([noise(2, side), torch.full((1, 3, side, side), 201, dtype=torch.uint8)])
    changed = deform(images, strength, np.random.default_rng(seed))
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert (changed[2] == 201).all()
    assert torch.equal(changed, deform(images, strength, np.random.default_rng(seed)))


def test_each_image_goes_its_own_way_and_its_channels_together() -> None:
    images = noise(1, 32, channels=1).expand(8, 3, -1, -1)
    changed = deform(images, 1.0, np.random.default_rng(1))
    assert len({image.numpy().tobytes() for image in changed}) == 8
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert torch.equal(changed[:, 0], changed[:, 2])


def test_a_dot_moves_no_further_than_is_said() -> None:
    side, place = 81, 60
    images = torch.zeros(200, 1, side, side, dtype=torch.uint8)
    images[:, :, place - 1 : place + 2, place - 1 : place + 2] = 255
    changed = deform(images, 1.0, np.random.default_rng(2)).double()
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    mass = changed.sum((1, 2, 3))
    middle = (side - 1) / 2
    found = torch.stack([(changed[:, 0] * axis).sum((1, 2)) / mass - middle for axis in (columns, rows)], 1)
    at = torch.full((2,), place - middle, dtype=torch.double)
    # 5 % of the side, then at most 15 % of the size, 15 degrees and a slant of 0.2 about the centre.
    bound = 0.05 * side * 2**0.5 / 0.85 + at.norm() * (0.2 + 0.27 + 0.2)
    distance = (found - at).norm(dim=1)
    assert distance.max() < bound
    assert distance.median() > 0.02 * side


def test_training_images_are_deformed_and_nothing_else() -> None:
    plain, deformed = small(0.0), small(1.0)
    before, after = plain.episode("train", 3), deformed.episode("train", 3)
    assert (before.shift, after.shift, after.strength) == (None, AUGMENTED, 1.0)
    assert torch.equal(before.query_ids, after.query_ids)
    assert torch.equal(before.support_ids, after.support_ids)
    assert before.classes == after.classes
    assert before.domain == after.domain
    assert not torch.equal(before.support, after.support)
    assert not torch.equal(before.query, after.query)
    assert torch.equal(plain.episode("test", 1).query, deformed.episode("test", 1).query)
    source, changed = plain._source.batch(4), deformed._source.batch(4)
    assert torch.equal(source.labels, changed.labels)
    assert not torch.equal(source.images, changed.images)
    measured = [next(iter(data.source_images(2)))[1] for data in (plain, deformed)]
    assert torch.equal(*measured)


def test_simulated_shifts_come_on_top() -> None:
    data = small(1.0)
    data.hparams["shift_share"] = 1.0
    data.setup()
    assert data.episode("train", 0).shift not in (None, AUGMENTED)


def test_a_strength_out_of_range_is_refused() -> None:
    with pytest.raises(ModmetaError, match=r"augment=1.5 must lie in 0..1"):
        DomainDataModule(augment=1.5)
