import pytest
import torch
from torch import Tensor

from modmeta.data.digits import DigitsDomains
from modmeta.data.shifts import SHIFTS, apply_shift, register_shift
from modmeta.errors import ModmetaError

NOISY = {"gaussian_noise", "impulse_noise", "speckle_noise"}
FAMILIES = list(SHIFTS)


@pytest.fixture(scope="module")
def images(digits: DigitsDomains) -> Tensor:
    """Eight pictures of every style and some smooth colours ``(64, 3, 32, 32)``."""
    rows = [row for domain in digits.domains for row in digits.ids(domain, "5")[:8]]
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand((8, 3, 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(colors, 32, mode="bilinear").mul(255).to(torch.uint8)
    return torch.cat([digits.load(rows), smooth])


def test_there_are_enough() -> None:
    assert len(FAMILIES) >= 16


@pytest.mark.parametrize("name", FAMILIES)
def test_strength_zero_is_the_identity(name: str, images: Tensor) -> None:
    assert torch.equal(apply_shift(name, images, 0.0, seed=1), images)
    values = torch.rand(2, 3, 8, 8)
    assert torch.equal(SHIFTS.get(name)(values, 0.0, torch.Generator()), values)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 33, 47), (3, 3, 8, 8)])
def test_shape_and_range(name: str, shape: tuple[int, ...]) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for strength in (0.01, 0.5, 1.0):
        shifted = SHIFTS.get(name)(values, strength, torch.Generator().manual_seed(2))
        assert shifted.shape == values.shape
        assert shifted.isfinite().all()
        assert shifted.min() >= 0
        assert shifted.max() <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_images_stay_finite(name: str) -> None:
    for value in (0, 255):
        plain = torch.full((2, 3, 16, 16), value, dtype=torch.uint8)
        assert apply_shift(name, plain, 0.7, seed=1).dtype == torch.uint8
        assert SHIFTS.get(name)(plain / 255, 0.7, torch.Generator()).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_seed_fixes_everything(name: str, images: Tensor) -> None:
    torch.manual_seed(1)
    one = apply_shift(name, images, 0.6, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(apply_shift(name, images, 0.6, seed=5), one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_effect_grows_with_strength(name: str, seed: int, images: Tensor) -> None:
    effects = [
        (apply_shift(name, images, strength, seed).float() - images.float()).abs().mean().item()
        for strength in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    ]
    assert effects == sorted(effects)
    assert effects[1] > 0
    assert effects[-1] > 4  # of 255, on average over all pixels


@pytest.mark.parametrize("name", FAMILIES)
def test_small_strengths_change_little(name: str, images: Tensor) -> None:
    shifted = apply_shift(name, images, 0.02, seed=0).float()
    assert (shifted - images).abs().mean() < 12


@pytest.mark.parametrize("name", FAMILIES)
def test_all_images_go_through_the_same_shift(name: str, images: Tensor) -> None:
    """What happens to an image does not depend on the images that follow; equal ones stay equal."""
    whole = apply_shift(name, images, 0.8, seed=3)
    part = apply_shift(name, images[:5], 0.8, seed=3)
    assert (whole[:5].int() - part.int()).abs().max() <= 1  # rounding
    repeated = apply_shift(name, images[:1].expand(4, -1, -1, -1), 0.8, seed=3)
    assert (repeated == repeated[:1]).all() == (name not in NOISY)


def test_unknown_family() -> None:
    with pytest.raises(ModmetaError, match=r"unknown shift 'gausian_blur'; did you mean 'gaussian_blur'\?"):
        apply_shift("gausian_blur", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0.5, 0)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(ModmetaError, match="it must lie in 0"):
        apply_shift("fog", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), strength, 0)


def test_a_user_adds_a_family() -> None:
    @register_shift("test_bright")
    def test_bright(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        return images + 2 * strength

    try:
        assert apply_shift("test_bright", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 1.0, 0).unique() == 255
    finally:
        del SHIFTS._items["test_bright"]
