"""The helpers of the learners' tests, and one tiny supernet with its run that several tests look at."""

import sys
from contextlib import chdir
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "learners"))  # for `import tiny`

from modmeta.cli import main

CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
data:
  root: digits
  train_domains: [ink, neon]
  val_domains: [slanted]
  test_domains: [paper]
  ways: 3
  shots: 2
  eval_shots: [2]
  queries: 2
  steps_per_epoch: 2
  episodes_per_step: 2
  val_episodes: 2
  test_episodes: 1
model:
  class_path: SupernetLearner
  init_args:
    backbone: {name: test_efficientnet, pretrained: false, image_size: 32}
    source_images: 3
    steps: 1
    units:
      - {module: film, depth: [0.5, 1.0], rate: 0.05}
      - {module: bias, depth: [0.5, 1.0]}
      - {module: projection, options: {rank: 2}}
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="session")
def supernet_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("supernet") / "supernet.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def checkpoint(supernet_config: Path) -> Path:
    """Fit once."""
    with chdir(supernet_config.parent):
        assert main(["fit", "--config", str(supernet_config)]) == 0
    return supernet_config.parent / "runs/supernet/version_0/checkpoints/last.ckpt"
