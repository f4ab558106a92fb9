"""The helpers of ``tiny``, and one fitted learner that several tests look at."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`

import tiny

from modmeta.data import DomainDataModule


@pytest.fixture(scope="module")
def data() -> DomainDataModule:
    """Return the tiny digits, ready to draw from."""
    module = tiny.digits()
    module.setup()
    return module


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tiny.Fitted:
    folder = tmp_path_factory.mktemp("fitted")
    learner, data = tiny.modular(source=tiny.source(), baselines=["prototype"]), tiny.digits()
    trainer = tiny.trainer(folder, 2, limit_val_batches=1.0)
    trainer.fit(learner, datamodule=data)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    trainer.save_checkpoint(folder / "last.ckpt")
    trainer.test(learner, datamodule=data, verbose=False)
    results = [result.to_dict() for result in learner.results if result.metric != "seconds"]
    return tiny.Fitted(learner, folder / "last.ckpt", results, logged)
