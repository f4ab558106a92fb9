"""One tiny run that the tests of all commands share, and the helpers of the learners' tests."""

import os
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from finished_run import Run
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "learners"))  # for `import tiny`

from modmeta.cli import main
from modmeta.data import DigitsDomains

CONFIG = """
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
data:
  root: digits
  val_domains: [slanted]
  test_domains: [neon]
  ways: 4
  shots: [1, 3]
  eval_shots: [1, 3]
  queries: 2
  steps_per_epoch: 2
  episodes_per_step: 1
  val_episodes: 1
  test_episodes: 2
  batch_size: 16
model:
  class_path: ModularMetaLearner
  init_args:
    backbone:
      name: test_efficientnet
      pretrained: false
      image_size: ${data.image_size}
    source:
      epochs: 1
    source_images: 5
    calibration_episodes: 2
    veto: false
    units:
      - module: norm_blend
        group: all
      - module: film
        group: all
"""


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Fit and test once; about five seconds."""
    root = tmp_path_factory.mktemp("run")
    with chdir(root):
        assert main(["fit", "--config", str(tiny_config), "--test_after_fit", "true"]) == 0
    digits = DigitsDomains(32)
    for name in digits.classes[:4]:
        (root / "support" / name).mkdir(parents=True)
        (root / "flat").mkdir(exist_ok=True)
        images = digits.load(digits.ids("neon", name)[:3]).permute(0, 2, 3, 1).numpy()
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(root / "support" / name / f"{number}.png")
            Image.fromarray(pixels).save(root / "flat" / f"{name}_{number}.png")
    return Run(tiny_config, root / "runs" / "tiny" / "version_0", root / "support", root / "flat")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every test write its runs into a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert os.getcwd() == str(tmp_path)
