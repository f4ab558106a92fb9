"""An adapter module from a package of its own: installed, found, checked, trained, saved, loaded, missed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "third_party" / "modmeta_stretch"

TRAIN = """
import sys
import torch
from torch.nn import functional as F
from modmeta.adaptation import Adapted, HEADS, Plan, inner_loop
from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.adapters.adapter_file import write_adapter
from modmeta.backbone import Backbone
from modmeta.serving import AdapterHost

model = AdaptedBackbone(Backbone("test_efficientnet", False, 32), [UnitConfig("stretch", depth=(0.5, 1.0))])
names, scalar = tuple(unit.name for unit in model.units), torch.tensor(0.5)
ones = torch.ones(len(names))
plan = Plan(names, ones, torch.full((len(names), 3), 0.05), 0 * ones, ones[:, None], scalar, scalar, scalar)
images, labels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
head = HEADS.get("prototype")()
loss = lambda features: F.cross_entropy(head.held_out(features, labels, 2), labels)
state, losses = inner_loop(model, model.fresh(), plan, images, loss)
assert losses[-1] < losses[0], losses
with torch.no_grad():
    features = model(images, state, plan.gate_of())
    assert not torch.equal(features, model.backbone(images))
    adapted = Adapted(state, plan, head.fit(features, labels, 2), ("cat", "dog"))
write_adapter(sys.argv[1], model, adapted.to_file({}))
host = AdapterHost(model)
host.add("domain", adapted)
answers = torch.stack([each.logits for each in host.predict(images, "domain")])
torch.testing.assert_close(answers, adapted.classifier(features), rtol=1e-4, atol=1e-4)
print(answers.tolist())
"""

LOAD = """
import sys
import torch
from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError
from modmeta.serving import AdapterHost

model = AdaptedBackbone(Backbone("test_efficientnet", False, 32), [UnitConfig(sys.argv[2], depth=(0.5, 1.0))])
host = AdapterHost(model)
try:
    host.load("domain", sys.argv[1])
except ModmetaError as error:
    sys.exit(f"modmeta: error: {error}")
images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print(torch.stack([each.logits for each in host.predict(images, "domain")]).tolist())
"""

CHECK = """
import sys
from modmeta.adapters import MODULES, check_module

cls = MODULES.get("stretch")
check_module(cls, backbones=("test_efficientnet", "test_vit"))
assert cls.__module__ in sys.modules
print(sys.modules[cls.__module__].__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package, without a network, where only ``PYTHONPATH`` leads."""
    folder = tmp_path_factory.mktemp("third_party")
    source, target = folder / "source", folder / "site"
    shutil.copytree(PACKAGE, source)  # building leaves files behind
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", str(target), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return target


def python(*arguments: str, path: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def output(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_module_is_one_short_file() -> None:
    assert len((PACKAGE / "modmeta_stretch.py").read_text().splitlines()) <= 40


def test_it_is_listed_only_while_it_is_installed(installed: Path) -> None:
    listed = output(python("-m", "modmeta", "modules", path=installed))
    assert "modmeta_stretch:Stretch" in listed
    assert "One factor per filter" in listed
    assert "stretch" not in output(python("-m", "modmeta", "modules", path=None))


def test_it_passes_the_conformance_kit(installed: Path) -> None:
    assert Path(output(python("-c", CHECK, path=installed))).parent == installed


def test_what_it_learns_goes_into_a_file_and_comes_back_in_another_process(installed: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "domain.safetensors")
    trained = output(python("-c", TRAIN, file, path=installed))
    assert output(python("-c", LOAD, file, "stretch", path=installed)) == trained
    again = str(tmp_path / "again.safetensors")  # the same bytes, whatever process wrote them
    assert output(python("-c", TRAIN, again, path=installed)) == trained
    assert Path(again).read_bytes() == Path(file).read_bytes()
    missing = python("-c", LOAD, file, "film", path=None)
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1
    assert "needs the adapter module 'stretch', which is unknown here; install its package" in missing.stderr
