"""One thread, a tiny learner that has measured its sources, and the digits that it is tested on."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modmeta.data import DigitsDomains, DomainDataModule
from modmeta.learners import BackboneConfig, MetaLearner

sys.path.insert(0, str(Path(__file__).parent))  # for `import compared`


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> DigitsDomains:
    return DigitsDomains(32)


@pytest.fixture(scope="session")
def learner(digits: DigitsDomains) -> MetaLearner:
    torch.manual_seed(0)
    made = MetaLearner(BackboneConfig("test_efficientnet", pretrained=False, image_size=32), source_images=5).eval()
    data = DomainDataModule(test_domains=["neon", "paper"], shots=1, eval_shots=[1], queries=2)
    data.store = digits
    data.setup("test")
    batches = ((domain, images, labels) for domain, images, labels, _ in data.source_images(5))
    made.sources.measure(made.model.backbone, batches, data.classes)
    return made
