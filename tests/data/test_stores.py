"""Stores that see another one's images with other classes."""

import numpy as np
import pytest
import torch

from modmeta.data import DigitsDomains, DomainDataModule
from modmeta.data.own_classes import OwnClasses
from modmeta.data.rotations import RotatedClasses


@pytest.fixture(scope="module")
def digits() -> DigitsDomains:
    return DigitsDomains()


def test_turned_classes_hold_the_turned_images(digits: DigitsDomains) -> None:
    turned = RotatedClasses(digits)
    assert len(turned) == 4 * len(digits)
    assert len(turned.classes) == 40
    rows = digits.ids("ink", "7")
    for turn, name in enumerate(["7", "7@90", "7@180", "7@270"]):
        expected = np.rot90(digits.load(rows).numpy(), turn, (2, 3))
        np.testing.assert_array_equal(turned.load(turned.ids("ink", name)).numpy(), expected)
    mixed = torch.tensor([rows[0] + 3 * len(digits), rows[1], rows[0]])
    assert torch.equal(turned.load(mixed)[2], digits.load(rows[:1])[0])
    assert turned.key != digits.key


def test_own_classes_keep_rows_and_split_names(digits: DigitsDomains) -> None:
    own = OwnClasses(digits)
    assert len(own) == len(digits)
    assert len(own.classes) == 70
    np.testing.assert_array_equal(own.ids("ink", "ink/7"), digits.ids("ink", "7"))
    assert len(own.ids("ink", "paper/7")) == 0
    assert own.classes_of("ink") == tuple(f"ink/{digit}" for digit in range(10))
    rows = own.ids("neon", "neon/3")
    assert torch.equal(own.load(rows), digits.load(rows))


def test_the_data_module_draws_new_classes_of_a_new_domain() -> None:
    data = DomainDataModule(own_classes=True, rotations=True, test_domains=["neon"], ways=5, shots=1, eval_shots=[1])
    data.setup("test")
    episode = data.episode("test", 0)
    assert len(set(episode.classes)) == 5
    assert all(name.startswith("neon/") for name in episode.classes)
    assert not set(episode.classes) & set(data.classes)
    assert len(data.classes) == 4 * 6 * 10
