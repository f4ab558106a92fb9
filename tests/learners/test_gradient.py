"""The gradient family as learners: they learn, are measured, saved and resumed, and refuse what makes no sense."""

from pathlib import Path
from typing import Any

import family
import pytest
import tiny
import torch
from family import BODY, METHODS
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from modmeta.adaptation import Adapted, DivergedError, Support
from modmeta.adaptation.execution import Loop
from modmeta.adapters import UnitConfig
from modmeta.data import DomainDataModule, Episode
from modmeta.errors import ModmetaError
from modmeta.learners import BackboneConfig, GradientLearner, MetaLearner, ReptileLearner, load_learner
from modmeta.learners.measuring import episode_support


@pytest.fixture(scope="module")
def digits() -> DomainDataModule:
    data = family.data(train_domains=["ink", "paper"], ways=3, shots=3, queries=5)
    data.setup()
    return data


def weights(learner: MetaLearner) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in learner.state_dict().items() if isinstance(t, Tensor)}


@torch.no_grad()
def held_out_loss(learner: MetaLearner, data: DomainDataModule) -> float:
    losses = []
    for index in range(1000, 1008):
        episode = data.episode("train", index)
        logits = learner.logits(learner.adapt(episode_support(episode, hide=False)), episode.query)
        losses.append(learner.query_loss(logits, episode.query_labels))
    return float(torch.stack(losses).mean())


def descend(learner: MetaLearner, data: DomainDataModule, steps: int) -> None:
    optimizer = learner.configure_optimizers()[0]
    parameters = learner.meta_parameters()
    for step in range(steps):
        _, gradients = learner.meta_gradient([data.episode("train", 2 * step + k) for k in range(2)], parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("name", [*METHODS, "reptile"])
def test_it_fits_the_digits(name: str, digits: DomainDataModule) -> None:
    learner: GradientLearner | ReptileLearner
    if name == "reptile":
        learner = family.reptile(steps=4, rate=0.01, test_steps=4)
    else:
        learner = family.gradient(**METHODS[name] | {"rate": 0.05, "learning_rate": 5e-3})
    before, fingerprint = held_out_loss(learner, digits), learner.model.backbone.fingerprint()
    descend(learner, digits, 50)
    assert held_out_loss(learner, digits) < before - 0.04
    assert learner.model.backbone.fingerprint() == fingerprint


class Interrupted(Callback):
    """Ends a fit after its first epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


def fit(learner: MetaLearner, folder: Path, *callbacks: Callback, checkpoint: Path | None = None) -> Trainer:
    trainer = tiny.trainer(folder, 3, callbacks=list(callbacks), limit_val_batches=1.0)
    trainer.fit(learner, datamodule=family.data(), ckpt_path=None if checkpoint is None else str(checkpoint))
    return trainer


@pytest.mark.parametrize("name", ["maml_pp", "proto_maml", "reptile"])
def test_a_fit_is_measured_saved_and_resumed_to_the_bit(name: str, tmp_path: Path) -> None:
    def make() -> GradientLearner | ReptileLearner:
        return family.reptile() if name == "reptile" else family.gradient(**METHODS[name], baselines=["ridge"])

    whole = make()
    fit(whole, tmp_path)
    first = make()
    fit(first, tmp_path, Interrupted()).save_checkpoint(tmp_path / "first.ckpt")
    resumed = make()
    trainer = fit(resumed, tmp_path, checkpoint=tmp_path / "first.ckpt")
    one, other, earlier = weights(whole), weights(resumed), weights(first)
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert any(not torch.equal(tensor, other[key]) for key, tensor in earlier.items())
    assert not whole.sources.ready  # nothing looks at them, so nothing was measured

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_learner(tmp_path / "last.ckpt")
    assert type(loaded) is type(whole)
    tiny.trainer(tmp_path, 1).test(loaded, datamodule=family.data(), verbose=False)
    tiny.trainer(tmp_path, 1).test(whole, datamodule=family.data(), verbose=False)
    figures = [r.to_dict() for r in loaded.results if r.metric != "seconds"]
    assert figures == [r.to_dict() for r in whole.results if r.metric != "seconds"]
    systems = {"none", "adapted"} | ({"ridge"} if name != "reptile" else set())
    assert {figure["system"] for figure in figures} == systems


def test_an_untrained_learner_is_not_tested(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match="not trained"):
        tiny.trainer(tmp_path, 1).test(family.gradient(), datamodule=family.data(), verbose=False)


def test_the_multi_step_loss_ends_after_its_epochs(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    class Watched(GradientLearner):
        def task(self, episode: Episode) -> dict[str, Tensor]:
            task = super().task(episode)
            seen.append(task["step_weights"].tolist() if "step_weights" in task else [])
            return task

    torch.manual_seed(0)
    learner = Watched(family.FOUR_BLOCK, family.FULL, ways=3, steps=2, multi_step_epochs=2)
    tiny.trainer(tmp_path, 3).fit(learner, datamodule=family.data(steps_per_epoch=1, episodes_per_step=1))
    assert seen == [[0.5, 0.5], [0.25, 0.75], []]


@pytest.mark.parametrize(("epochs", "weighed"), [(0, False), (2, True)])
def test_a_task_can_be_made_outside_a_fit_though_a_source_phase_comes_first(epochs: int, weighed: bool) -> None:
    learner = family.gradient(steps=2, multi_step_epochs=epochs, source=tiny.source())
    assert ("step_weights" in learner.task(family.episodes(1)[0])) == weighed


def test_adapting_leaves_the_learner_alone_and_reports_what_moved(digits: DomainDataModule) -> None:
    episode = digits.episode("train", 0)
    support = episode_support(episode, hide=False)
    for adapted, share in (["*"], 1.0), ([BODY], 1.0), (["full@blocks/3*", "head"], 0.25), (["head"], 0.0):
        learner = family.gradient(adapted=adapted, steps=2, test_steps=3, rate=0.05)
        before = weights(learner)
        with torch.no_grad():
            one, again = learner.adapt(support), learner.adapt(support)
        assert all(torch.equal(tensor, before[key]) for key, tensor in weights(learner).items())
        assert all(torch.equal(tensor, again.state[key]) for key, tensor in one.state.items())
        assert one.plan.rates.shape == (8, 3)
        assert learner.updated(one)["units_updated"] == share
        moved = [unit for unit, rates in zip(one.plan.units, one.plan.rates, strict=True) if bool(rates.any())]
        assert len(moved) == 8 * share


def test_an_adapter_file_holds_all_that_is_needed(digits: DomainDataModule, tmp_path: Path) -> None:
    episode = digits.episode("train", 0)
    learner = family.gradient(steps=2, rate=0.05)
    with torch.no_grad():
        adapted = learner.adapt(episode_support(episode, hide=False))
        back = Adapted.from_file(adapted.to_file({}))
        assert torch.equal(learner.logits(back, episode.query), learner.logits(adapted, episode.query))


@pytest.mark.parametrize("head", ["zero", "prototype"])
def test_these_heads_take_any_number_of_classes(head: str) -> None:
    learner = family.gradient(head=head, ways=3, rate=0.05)
    five = family.episodes(1, ways=5)[0]
    with torch.no_grad():
        assert learner.logits(learner.adapt(episode_support(five, hide=False)), five.query).shape == (20, 5)
    linear = family.gradient(ways=3)
    with pytest.raises(ModmetaError, match="made for 3 classes and is given 5"):
        linear.adapt(episode_support(five, hide=False))


def test_few_parameters_of_a_transformer_can_be_learned_too() -> None:
    backbone = BackboneConfig("test_vit", pretrained=False, image_size=32)
    units = [UnitConfig("film", depth=(0.5, 1.0), group="all"), UnitConfig("projection", {"rank": 2})]
    learner = GradientLearner(backbone, units, ways=3, steps=2, rate=0.05)
    episode = family.episodes(1, size=32)[0]
    loss, gradients = learner.meta_gradient([episode], learner.meta_parameters())
    assert torch.isfinite(loss)
    assert any(bool(gradient.any()) for gradient in gradients)


def test_images_without_labels_are_refused() -> None:
    episode = family.episodes(1)[0]
    with pytest.raises(ModmetaError, match="labelled images only"):
        family.gradient().adapt(Support(episode.support, None, episode.classes))


def test_a_loss_that_is_not_finite_names_the_episode() -> None:
    learner = family.gradient(rate=1e30, steps=3, order=1)
    with pytest.raises(DivergedError, match="episode 0, domain 'ink': the loss is not finite"):
        learner.meta_gradient(family.episodes(), learner.meta_parameters())


@pytest.mark.fault(17)
def test_a_gradient_that_is_not_finite_names_the_unit() -> None:
    class Broken(Loop):
        def meta_gradient(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
            losses, gradients = super().meta_gradient(*arguments)
            return losses, {name: g * (torch.nan if name == "bank.prior.0" else 1.0) for name, g in gradients.items()}

    learner = family.gradient()
    learner.execution = Broken()
    told = r"episode 0, domain 'ink': the gradient of full@\S* in this or a later one"
    with pytest.raises(DivergedError, match=told):
        learner.meta_gradient(family.episodes(), learner.meta_parameters())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"head": "cosine"}, "head to start from: 'cosine'"),
        ({"ways": 1}, "ways is 1"),
        ({"rate": 0.0}, "rate must be finite and above 0"),
        ({"steps": 0}, "steps must be finite and above 0"),
        ({"test_steps": 0}, "test_steps must be finite and above 0"),
        ({"order": 3}, "order must be 1 or 2"),
        ({"adapted": ["haed"]}, "did you mean 'head'"),
        ({"adapted": []}, "adapted is empty"),
        ({"multi_step_epochs": 3}, "set steps to 2 or more"),
        ({"rule": "meta_sgd", "head": "prototype"}, "take rule lslr, or head linear"),
        ({"rule": "meta_sgd", "head": "zero"}, "a zero head has none"),
        ({"adapted": ["full@*"], "head": "zero"}, "adapt head, too"),
        ({"rule": "adam"}, "unknown step rule 'adam'"),
        ({"execution": "lop"}, "did you mean 'loop'"),
        ({"units": (), "head": "prototype"}, "nothing would be learned"),
        ({"units": (UnitConfig("norm_blend"),), "backbone": tiny.BACKBONE}, "'norm_blend' reads statistics"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ModmetaError, match=line):
        family.gradient(**changes)
