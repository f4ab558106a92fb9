"""Small image collections to test with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modmeta.data.digits import DigitsDomains


@pytest.fixture(scope="session")
def digits() -> DigitsDomains:
    return DigitsDomains()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes ``root/domain/class/*.png`` of random pixels."""

    def make(domains: str = "art photo", classes: str = "cat dog", images: int = 3, side: int = 12) -> Path:
        random = np.random.default_rng(0)
        for domain in domains.split():
            for name in classes.split():
                folder = tmp_path / "data" / domain / name
                folder.mkdir(parents=True, exist_ok=True)
                for index in range(images):
                    pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{index}.png")
        return tmp_path / "data"

    return make
