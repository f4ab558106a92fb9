"""Learners end to end, at a tiny size: both phases, checkpoints, subclasses, and what must never change."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Fitted
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from modmeta.adaptation import Adapted, DivergedError, Support
from modmeta.adapters import UnitConfig
from modmeta.data import DomainDataModule, Episode
from modmeta.errors import ModmetaError
from modmeta.learners import BackboneConfig, MetaLearner, ModularMetaLearner, load_learner

NORMS = ("test_efficientnet", "test_efficientnet_gn", "test_convnext")


def tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def supports(data: DomainDataModule, count: int = 3) -> list[tuple[Support, Tensor]]:
    """Return supports of different domains, with their queries."""
    found: dict[str, tuple[Support, Tensor]] = {}
    for index in range(100):
        episode = data.episode("train", index)
        found.setdefault(
            episode.domain, (Support(episode.support, episode.support_labels, episode.classes), episode.query)
        )
    return list(found.values())[:count]


# ---------------------------------------------------------------------- isolation


def open_wide(learner: ModularMetaLearner) -> None:
    """Let every plan be carried out with large steps, so that whatever could leak would."""
    learner.veto = False
    with torch.no_grad():
        learner.policy.per_unit.bias[0] = 10.0
        learner.policy.per_unit.bias[1] = 2.0


@pytest.mark.parametrize("name", NORMS)
def test_adapting_to_one_domain_leaves_the_others_and_the_backbone_alone(name: str, tmp_path: Path) -> None:
    blend = (UnitConfig("norm_blend"),) if name == "test_efficientnet" else ()
    units = (*blend, UnitConfig("film"), UnitConfig("lora", {"rank": 2}), UnitConfig("projection"))
    learner = tiny.modular(backbone=BackboneConfig(name, False, 32), units=units)
    data = tiny.digits()
    data.setup()
    learner.sources.measure(learner.model.backbone, [c[:3] for c in data.source_images(3)], data.classes)
    open_wide(learner)
    learner.eval()
    (a, query_a), (b, query_b), (c, query_c) = supports(data)
    with torch.no_grad():
        adapted_b, adapted_c = learner.adapt(b), learner.adapt(c)
        assert len(learner.model.active(adapted_b.plan.gate_of())) == len(learner.model.units)
        before = learner.logits(adapted_b, query_b), learner.logits(adapted_c, query_c)
        fingerprint, weights = learner.model.backbone.fingerprint(), tensors(learner)
        adapted_a = learner.adapt(a)
        assert not torch.equal(learner.logits(adapted_a, query_b), before[0])  # the adaptation does something
        learner.logits(adapted_a, query_a)
        assert torch.equal(learner.logits(adapted_b, query_b), before[0])
        assert torch.equal(learner.logits(adapted_c, query_c), before[1])
        again = learner.adapt(b)
    assert learner.model.backbone.fingerprint() == fingerprint
    assert same(tensors(learner), weights)
    assert same(again.state, adapted_b.state)


@pytest.mark.parametrize("name", NORMS)
def test_a_plan_without_open_gates_changes_no_logit(name: str) -> None:
    blend = (UnitConfig("norm_blend"),) if name == "test_efficientnet" else ()
    units = (*blend, UnitConfig("film"), UnitConfig("lora"), UnitConfig("projection"))
    learner = tiny.modular(backbone=BackboneConfig(name, False, 32), units=units).eval()
    data = tiny.digits()
    data.setup()
    learner.sources.measure(learner.model.backbone, [c[:3] for c in data.source_images(3)], data.classes)
    (support, query), *_ = supports(data)
    with torch.no_grad():
        features = learner.model.backbone(support.images)
        expected = learner.fit_head(features, support)(learner.model.backbone(query))
        idle = Adapted(
            learner.bank.initial(), learner.idle_plan(), learner.fit_head(features, support), support.classes
        )
        assert torch.equal(learner.logits(idle, query), expected)
        # Fresh modules with open gates, through the units' own path.
        gates = {unit.name: 1.0 for unit in learner.model.units}
        x, q = (learner.model(images, learner.bank.initial(), gates) for images in (support.images, query))
        assert torch.equal(learner.fit_head(x, support)(q), expected)


# ---------------------------------------------------------------------- fit


def test_both_phases_train_and_are_measured(fitted: Fitted) -> None:
    fresh = tiny.modular(source=tiny.source(), baselines=["prototype"])
    assert fitted.learner.model.backbone.fingerprint() != fresh.model.backbone.fingerprint()  # source training
    moved = {
        n.partition(".")[0] for n, p in fresh.named_parameters() if not torch.equal(p, fitted.learner.get_parameter(n))
    }
    assert {"policy", "bank", "head", "model"} <= moved
    assert "baselines" not in moved
    assert {"source/accuracy", "train/loss", "val/gain"} <= fitted.logged.keys()
    assert all(math.isfinite(value) for value in fitted.logged.values())
    assert not any(p.grad is not None and p.requires_grad is False for p in fitted.learner.parameters())


def test_results_hold_every_system_per_domain_and_shots(fitted: Fitted) -> None:
    cells = {(r["system"], r["domain"], r["shots"], r["episodes"], r["ways"]) for r in fitted.results}
    systems = ("source", "prototype", "none", "adapted")
    assert cells == {(system, "neon", shots, 3, 3) for system in systems for shots in (2, 3)}
    metrics = {r["metric"] for r in fitted.results if r["system"] == "adapted"}
    assert metrics == {"accuracy", "nll", "ece", "gain", "harm_rate", "units_updated", "parameters_updated"}
    by_key = {(r["system"], r["shots"], r["metric"]): r["value"] for r in fitted.results}
    for shots in (2, 3):
        gain = by_key["adapted", shots, "accuracy"] - by_key["none", shots, "accuracy"]
        assert by_key["adapted", shots, "gain"] == pytest.approx(gain)
        assert 0 <= by_key["adapted", shots, "units_updated"] <= 1


def test_a_checkpoint_gives_the_same_results_to_the_bit(fitted: Fitted, tmp_path: Path) -> None:
    learner = load_learner(fitted.checkpoint)
    assert type(learner) is ModularMetaLearner
    assert learner.model.backbone.fingerprint() == fitted.learner.model.backbone.fingerprint()
    assert learner.sources.domains == fitted.learner.sources.domains
    tiny.trainer(tmp_path, 1).test(learner, datamodule=tiny.digits(), verbose=False)
    assert [r.to_dict() for r in learner.results if r.metric != "seconds"] == fitted.results


def test_the_same_fit_gives_the_same_weights(fitted: Fitted, tmp_path: Path) -> None:
    learner = tiny.modular(source=tiny.source(), baselines=["prototype"])
    tiny.trainer(tmp_path, 2).fit(learner, datamodule=tiny.digits())  # without validation in between
    assert same(tensors(learner), tensors(fitted.learner))


def test_a_fit_that_is_resumed_ends_where_a_whole_one_does(fitted: Fitted, tmp_path: Path) -> None:
    whole = tiny.modular(source=tiny.source(), baselines=["prototype"])
    tiny.trainer(tmp_path, 3).fit(whole, datamodule=tiny.digits())
    resumed = tiny.modular(source=tiny.source(), baselines=["prototype"])
    tiny.trainer(tmp_path, 3).fit(resumed, datamodule=tiny.digits(), ckpt_path=str(fitted.checkpoint))
    assert not same(tensors(resumed), tensors(fitted.learner))
    assert same(tensors(resumed), tensors(whole))


def test_the_head_alone_meta_trains(tmp_path: Path) -> None:
    learner = tiny.head_only(learning_rate=0.05, head="ridge")
    before = tensors(learner)
    tiny.trainer(tmp_path, 1).fit(learner, datamodule=tiny.digits())
    moved = {name for name, tensor in tensors(learner).items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.log_scale", "head.log_ridge"}
    tiny.trainer(tmp_path, 1).test(learner, datamodule=tiny.digits(), verbose=False)
    gains = [r.value for r in learner.results if r.metric == "gain" and r.system == "adapted"]
    assert gains == [0.0, 0.0]  # the head is what "none" has, too


class Negative(MetaLearner):
    """Classifies by minus the distance to class means in a way of its own, with its own loss."""

    losses = 0

    def adapt(self, support: Support) -> Adapted:
        adapted = super().adapt(support)
        adapted.report["own"] = True
        return adapted

    def query_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        type(self).losses += 1
        return 2 * F.multi_margin_loss(logits, labels)


def test_a_subclass_with_its_own_adapt_and_loss(tmp_path: Path) -> None:
    learner = tiny.head_only(Negative)
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(learner, datamodule=tiny.digits())
    assert Negative.losses == 4
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again = load_learner(tmp_path / "own.ckpt")
    assert type(again) is Negative
    assert same(tensors(again), tensors(learner))


# ---------------------------------------------------------------------- what is refused


class Writing(MetaLearner):
    """Writes to the backbone that all domains share."""

    def adapt(self, support: Support) -> Adapted:
        with torch.no_grad():
            next(self.model.backbone.parameters()).add_(1e-3)
        return super().adapt(support)


def test_a_backbone_that_changes_during_meta_training_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match="the frozen backbone changed during meta-training"):
        tiny.trainer(tmp_path, 1).fit(tiny.head_only(Writing), datamodule=tiny.digits())


class Exploding(ModularMetaLearner):
    """Has a loss that is not finite from the fourth episode on."""

    seen = 0

    def episode_loss(self, episode: Any) -> Tensor:
        self.seen += 1
        return super().episode_loss(episode) * (math.nan if self.seen > 3 else 1.0)


def test_a_loss_that_is_not_finite_stops_before_it_reaches_a_weight(tmp_path: Path) -> None:
    learner, data = tiny.modular(Exploding), tiny.digits()
    before = tensors(learner)
    with pytest.raises(DivergedError) as caught:
        tiny.trainer(tmp_path, 2).fit(learner, datamodule=data)
    episode = data.episode("train", 3)
    assert f"step 1, episode 3, domain {episode.domain!r}" in str(caught.value)
    after = tensors(learner)
    assert all(torch.isfinite(tensor).all() for tensor in after.values() if tensor.is_floating_point())
    assert not same(before, after)  # the first step was taken


def test_checkpoints_for_something_else_are_refused(fitted: Fitted, tmp_path: Path) -> None:
    def test_with(**changes: Any) -> None:
        learner = tiny.modular(**({"source": tiny.source(), "baselines": ["prototype"]} | changes))
        tiny.trainer(tmp_path, 1).test(
            learner, datamodule=tiny.digits(), ckpt_path=str(fitted.checkpoint), verbose=False
        )

    with pytest.raises(ModmetaError, match="for another backbone: it has test_efficientnet, this model test_resnet"):
        test_with(backbone=BackboneConfig("test_resnet", False, 32))
    with pytest.raises(ModmetaError, match="for another set of units"):
        test_with(units=tiny.UNITS[:2])


def test_a_checkpoint_of_other_frozen_weights_is_refused(tmp_path: Path) -> None:
    learner = tiny.head_only()
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(learner, datamodule=tiny.digits())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = tiny.head_only(backbone=BackboneConfig("test_efficientnet", False, 32, seed=1))
    with pytest.raises(ModmetaError, match="another backbone fingerprint"):
        tiny.trainer(tmp_path, 1).test(
            other, datamodule=tiny.digits(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False
        )


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "foreign"])
def test_files_that_are_no_checkpoints(damage: str, fitted: Fitted, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a checkpoint")
        case "truncated":
            path.write_bytes(fitted.checkpoint.read_bytes()[:2000])
        case "foreign":
            torch.save({"state_dict": {}}, path)
    with pytest.raises(ModmetaError, match=r"x\.ckpt") as caught:
        load_learner(path)
    assert "\n" not in str(caught.value)


def test_an_untrained_model_is_not_tested(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match="was not trained"):
        tiny.trainer(tmp_path, 1).test(tiny.modular(), datamodule=tiny.digits(), verbose=False)


class Strange(DomainDataModule):
    """Asks about a class that is not in the support."""

    def episode(self, split: str, index: int) -> Episode:
        episode = super().episode(split, index)
        return dataclasses.replace(episode, query_labels=episode.query_labels + 1)

    def test_dataloader(self) -> DataLoader[list[Episode]]:
        return DataLoader([self.episode("test", 2)], collate_fn=list)


@pytest.mark.fault(13)
def test_a_query_of_a_class_without_support_is_no_index_error(tmp_path: Path) -> None:
    learner = tiny.head_only(source_images=2)
    tiny.trainer(tmp_path, 1).fit(learner, datamodule=tiny.digits())
    data = Strange(**tiny.digits().hparams)
    with pytest.raises(ModmetaError, match="episode 2, domain 'neon': query label 3 is none of the 3 of its support"):
        tiny.trainer(tmp_path, 1).test(learner, datamodule=data, verbose=False)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: tiny.modular(units=()), "at least one adapter module"),
        (lambda: tiny.modular(budget=1.5), "budget must lie in 0..1"),
        (lambda: tiny.modular(head="rigde"), "unknown head 'rigde'; did you mean 'ridge'"),
        (lambda: tiny.modular(rule="polcy"), "unknown update rule 'polcy'; did you mean 'policy'"),
        (lambda: tiny.modular(indicators=["tsak"]), "unknown indicator 'tsak'; did you mean 'task'"),
    ],
)
def test_options_that_cannot_be(build: Callable[[], MetaLearner], expected: str) -> None:
    with pytest.raises(ModmetaError, match=expected):
        build()


@pytest.mark.parametrize("rule", ["alfa", "lslr", "constant"])
def test_beside_any_rule_all_else_is_the_same(rule: str) -> None:
    def built(rule: str) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        learner = tiny.modular(rule=rule)
        return {name: t for name, t in tensors(learner).items() if not name.startswith("rule.")}, torch.rand(3)

    (mine, after), (usual, expected) = built(rule), built("policy")
    assert same(mine, usual)
    assert torch.equal(after, expected)  # what a fit draws next


# ---------------------------------------------------------------------- adapting


def test_unlabelled_images_move_only_what_needs_no_labels(fitted: Fitted) -> None:
    learner, data = copy.deepcopy(fitted.learner).eval(), tiny.digits()
    data.setup()
    open_wide(learner)
    (support, query), *_ = supports(data)
    unlabelled = Support(support.images, None, data.classes)
    with torch.no_grad():
        adapted = learner.adapt(unlabelled)
        logits = learner.logits(adapted, query)
    assert set(adapted.plan.gate_of()) == {"norm_blend@all"}
    assert logits.shape == (len(query), len(data.classes))
    assert not adapted.report["labelled"]
    with pytest.raises(ModmetaError, match="class 'yak' is new to the source domains, so its images need labels"):
        learner.adapt(Support(support.images, None, ("0", "yak")))


def test_a_hidden_domain_is_hidden_from_everything(fitted: Fitted) -> None:
    learner, data = copy.deepcopy(fitted.learner).eval(), tiny.digits()
    data.setup()
    open_wide(learner)
    episode = data.episode("train", 0)
    hidden = Support(episode.support, episode.support_labels, episode.classes, hidden=episode.domain)
    shown = Support(episode.support, episode.support_labels, episode.classes)
    mean = learner.model.backbone(episode.support).mean(0)

    def keep(domain: str, by: float) -> None:
        learner.bank.add(domain, {name: tensor + by for name, tensor in learner.model.fresh().items()}, mean)

    with torch.no_grad():
        keep(episode.domain, 1.0)
        keep("elsewhere", 0.1)
        before, seen = learner.adapt(hidden), learner.adapt(shown)
        # Whatever is known of the domain may change without changing anything.
        keep(episode.domain, -3.0)
        k = learner.sources.domains.index(episode.domain)
        learner.sources.mean[k] += 5
        learner.sources.norm_mean[k] += 5
        learner.sources.variance[k] *= 3
        after, seen_after = learner.adapt(hidden), learner.adapt(shown)
    assert before.plan.bank.shape[1] == 2
    assert seen.plan.bank.shape[1] == 3
    assert same(before.state, after.state)
    assert before.plan.to_dict() == after.plan.to_dict()
    assert torch.equal(before.classifier.weight, after.classifier.weight)
    assert not same(seen.state, seen_after.state)  # shown, it counts


def test_a_new_domains_specialist_is_matched_on_its_statistics(fitted: Fitted) -> None:
    learner, data = copy.deepcopy(fitted.learner).eval(), tiny.digits()
    data.setup()
    open_wide(learner)
    (near, query), (far, _), *_ = supports(data)
    with torch.no_grad():
        learner.policy.per_unit.bias[3:] = torch.tensor([-20.0, 5.0])  # all to the specialists, the nearest first
        fresh = learner.model.fresh()
        for domain, support, by in (("near", near, 0.2), ("far", far, -0.2)):
            mean = learner.model.backbone(support.images).mean(0)
            learner.bank.add(domain, {name: tensor + by for name, tensor in fresh.items()}, mean)
        adapted = learner.adapt(near)
        weights = adapted.plan.bank
        assert bool((weights[:, 1] > weights[:, 2]).all())
        assert torch.equal(learner.logits(learner.adapt(near), query), learner.logits(adapted, query))


def test_training_episodes_repeat_their_gates_noise(fitted: Fitted) -> None:
    learner, data = copy.deepcopy(fitted.learner).train(), tiny.digits()
    data.setup()
    losses = [float(learner.episode_loss(data.episode("train", index)).detach()) for index in (0, 1, 0)]
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]
