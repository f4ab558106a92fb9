"""A tiny learner that has measured its sources, and the digits that it is tested on."""

import sys
from pathlib import Path

import pytest
import torch

from modmeta.adaptation import Support
from modmeta.adapters import UnitConfig
from modmeta.data import DigitsDomains, DomainDataModule
from modmeta.learners import BackboneConfig, MetaLearner, ModularMetaLearner

sys.path.insert(0, str(Path(__file__).parent))  # for `import compared`


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


@pytest.fixture(scope="session")
def modular(digits: DigitsDomains) -> ModularMetaLearner:
    """Return a tiny learner with units, all of which its plans open."""
    torch.manual_seed(0)
    units = (UnitConfig("norm_blend", group="all"), UnitConfig("film"), UnitConfig("projection", {"rank": 2}))
    backbone = BackboneConfig("test_efficientnet", pretrained=False, image_size=32)
    made = ModularMetaLearner(backbone, units, source_images=5, steps=2, veto=False).eval()
    with torch.no_grad():
        for parameter in made.model.backbone.parameters():
            if float(parameter.abs().max()) < 1e-2:  # a bias of zero, or a branch that is closed
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) + 0.5)
    data = DomainDataModule(test_domains=["neon", "paper"], shots=1, eval_shots=[1], queries=2)
    data.store = digits
    data.setup("test")
    made.sources.measure(made.model.backbone, [chunk[:3] for chunk in data.source_images(5)], data.classes)
    return made


@pytest.fixture
def labelled(digits: DigitsDomains) -> Support:
    """Return four images of each of three classes of a domain that is no source."""
    classes = digits.classes[:3]
    images = torch.cat([digits.load(digits.ids("neon", name)[:4]) for name in classes])
    return Support(images, torch.arange(3).repeat_interleave(4), tuple(classes))
