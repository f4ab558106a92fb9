"""What is not finite stops a fit before it gets anywhere, memory that runs out gives smaller parts or advice."""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from traced import fit, same

from modmeta.adaptation import DivergedError
from modmeta.adapters import UnitConfig
from modmeta.cli import main
from modmeta.data import Episode
from modmeta.errors import ModmetaError
from modmeta.learners import AtomicCheckpointIO, BackboneConfig, MetaLearner, ModularMetaLearner


class Broken(ModularMetaLearner):
    """Has a loss, a gradient, or a step that is not finite from the fourth episode on."""

    what = "nothing"

    def episode_loss(self, episode: Episode) -> Tensor:
        loss = super().episode_loss(episode)
        if episode.index < 3:
            return loss
        match self.what:
            case "nan":
                return loss * math.nan
            case "infinite":
                return loss * math.inf
            case "gradient":
                (value,) = [p for name, p in zip(self.bank.names, self.bank.prior, strict=True) if "shift" in name][:1]
                return loss + (value.square().sum() * 0).sqrt()  # 0, with a gradient of 0 / 0
        return loss

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        if self.what == "step":
            optimizers[0].register_step_pre_hook(lambda optimizer, *_: self._overflow(optimizer))
        return optimizers

    def _overflow(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step >= 1:
            for group in optimizer.param_groups:
                group["eps"] = 0.0  # Adam then divides by zero, though every gradient is finite


def broken(what: str) -> ModularMetaLearner:
    learner = tiny.modular(Broken, units=(UnitConfig("bias", group="all"),), source_images=2, calibration_episodes=1)
    learner.what = what  # type: ignore[attr-defined]
    return learner


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", r"step 1, episode 3, domain '\w+': the loss is nan"),
        ("infinite", r"step 1, episode 3, domain '\w+': the loss is inf"),
        ("gradient", r"step 1, episode 3, domain '\w+': the gradient of bias@all\S* is not finite"),
        ("step", r"epoch 0, step 1: the step left .* not finite"),
    ],
)
def test_what_is_not_finite_reaches_no_file(what: str, message: str, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_on_exception=True, save_top_k=-1)
    log = CSVLogger(tmp_path, name="log", version=0)
    options: dict[str, Any] = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    with pytest.raises(ModmetaError) as caught:
        fit(tmp_path, broken(what), callbacks=[keeper], logger=log, **options)
    # The attempt to save on that exception may fail, too: a checkpoint of such weights is refused.
    first = caught.value if isinstance(caught.value, DivergedError) else caught.value.__context__
    assert re.search(message, str(first))
    (file,) = tmp_path.glob("*.ckpt")
    saved = torch.load(file, weights_only=True)
    del saved["callbacks"]  # whose best score so far is infinite on purpose
    tensors = list(leaves(saved))
    assert len(tensors) > 50
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    rows = list(csv.DictReader((tmp_path / "log/version_0/metrics.csv").open()))
    assert len(rows) == 1
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())


def leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)


@pytest.mark.fault(17)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_no_result(value: float, tmp_path: Path) -> None:
    class Odd(MetaLearner):
        def evaluate(self, episode: Episode) -> Any:
            logits, facts = super().evaluate(episode)
            return logits, {"adapted": facts["adapted"] | {"units_updated": value}}

    learner = tiny.head_only(Odd, source_images=2)
    with pytest.raises(DivergedError, match="domain 'slanted': units_updated of system 'adapted' is not finite"):
        fit(tmp_path, learner)
    assert not hasattr(learner, "results")


@pytest.mark.fault(17)
def test_finite_logits_with_an_infinite_loss_are_no_result(tmp_path: Path) -> None:
    class Far(MetaLearner):
        def evaluate(self, episode: Episode) -> Any:
            logits, facts = super().evaluate(episode)
            wrong = (episode.query_labels + 1) % 3
            chosen = torch.nn.functional.one_hot(wrong, 3).bool()
            logits["adapted"] = torch.where(chosen, 3e38, -3e38)  # finite, unlike their differences
            return logits, facts

    learner = tiny.head_only(Far, source_images=2)
    with pytest.raises(DivergedError, match="val, domain 'slanted', 2-shot: nll of system 'adapted' is not finite"):
        fit(tmp_path, learner)
    assert not hasattr(learner, "results")


# ---------------------------------------------------------------------- memory


class Hungry(MetaLearner):
    """Computes its episodes at once, and has memory for so many."""

    room = 1
    error: BaseException = torch.OutOfMemoryError("CUDA out of memory")
    asked: list[int]

    def meta_gradient(self, episodes: Sequence[Episode], parameters: Sequence[nn.Parameter]) -> Any:
        self.asked = [*getattr(self, "asked", []), len(episodes)]
        if len(episodes) > self.room:
            raise self.error
        return super().meta_gradient(episodes, parameters)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


def hungry(room: int, error: BaseException) -> Hungry:
    learner = tiny.head_only(Hungry, source_images=2, learning_rate=0.05)
    assert isinstance(learner, Hungry)
    learner.room, learner.error = room, error
    return learner


@pytest.mark.fault(40)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_episodes_with_the_same_result(error: BaseException, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": {"episodes_per_step": 5}, "max_steps": 2, "limit_val_batches": 0}
    expected = fit(tmp_path, tiny.head_only(source_images=2, learning_rate=0.05), **options)
    learner = hungry(2, error)
    with pytest.warns(UserWarning, match="out of memory with 5 episodes at once; going on with 3 at once") as warned:
        found = fit(tmp_path, learner, **options)
    assert learner.asked == [5, 3, 2, 2, 1, 2, 2, 1]  # and from then on what has room
    assert sum("out of memory" in str(each.message) for each in warned) == 2
    for (name, step, value), (other, when, wanted) in zip(found.rows, expected.rows, strict=True):
        assert (name, step) == (other, when)
        assert value == pytest.approx(wanted, abs=1e-5)
    for key in ("head.log_scale", "head.log_ridge"):
        torch.testing.assert_close(found.state[key], expected.state[key], rtol=0, atol=1e-5)


@pytest.mark.fault(40)
def test_out_of_memory_with_one_episode_gives_advice(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match="epoch 0, step 0: out of memory with one episode at once; choose a smaller"):
        fit(tmp_path, hungry(0, ERRORS[0]))


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(tmp_path, hungry(0, RuntimeError("shapes cannot be multiplied")))


@pytest.mark.fault(40)
def test_out_of_memory_in_source_training_gives_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(*args: object) -> Tensor:
        raise ERRORS[0]

    monkeypatch.setattr("modmeta.learners.source.SourcePhase.loss", loss)
    with pytest.raises(ModmetaError, match="epoch 0, step 0: out of memory in source training; choose a smaller"):
        fit(tmp_path)


@pytest.mark.fault(40)
@pytest.mark.parametrize("error", [ERRORS[0], ERRORS[2]])
def test_out_of_memory_in_any_command_is_one_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> int:
        raise error

    monkeypatch.setattr("modmeta.commands.modules.run", run)
    assert main(["modules"]) == 2
    assert capsys.readouterr().err.startswith("modmeta: error: out of memory; choose smaller images")


# ---------------------------------------------------------------------- the frozen backbone


@pytest.mark.fault(35)
@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_vit"])
def test_train_mode_does_not_reach_a_frozen_backbone(name: str) -> None:
    learner = tiny.head_only(backbone=BackboneConfig(name, False, 32))
    backbone = learner.model.backbone
    before, images = backbone.fingerprint(), torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = backbone(images)
    learner.train()
    assert not any(module.training for module in backbone.model.modules())
    assert same(backbone(images), expected)
    assert backbone.fingerprint() == before
