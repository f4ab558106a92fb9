"""The rivals' own formulas against direct autograd on the plain model, and against scikit-learn."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import backward_macs, inner_loop, read_statistics
from modmeta.adapters import UnitConfig
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems import SYSTEMS, AutoRGN, Constant, RandomGates, SparseUpdate, Task, TinyTrain
from modmeta.evaluation.systems.readout import ClosedForm
from modmeta.evaluation.systems.unit_system import GradientSystem
from modmeta.learners import ModularMetaLearner

MakeTask = Callable[..., Task]
LAYERS = [UnitConfig("full", kinds=["conv", "dwconv", "pwconv"], group="site")]
FILM = [UnitConfig("film")]


def build(name: str, learner: ModularMetaLearner, **options: Any) -> Any:
    system = SYSTEMS.get(name)(**options)
    system.prepare(learner)
    return system


@contextmanager
def trainable(learner: ModularMetaLearner) -> Iterator[Mapping[str, Tensor]]:
    """Yield the plain model's parameters, for gradients with respect to the network itself."""
    parameters = dict(learner.model.backbone.model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        learner.zero_grad()  # the head's numbers, too, have got gradients


def plain_features(learner: ModularMetaLearner, images: Tensor) -> Tensor:
    return learner.model.backbone.model(learner.model.backbone.prepare(images))


def support_loss(learner: ModularMetaLearner, task: Task) -> Tensor:
    return learner.inner_loss(plain_features(learner, task.support.images), task.support).mean()


def states(system: GradientSystem, task: Task, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return the state that a system ends with."""
    found: list[dict[str, Tensor]] = []
    outcome = type(system).outcome

    def spy(self: GradientSystem, task: Task, state: dict[str, Tensor], *args: Any) -> Any:
        found.append(state)
        return outcome(self, task, state, *args)

    monkeypatch.setattr(type(system), "outcome", spy)
    with torch.no_grad():
        system.adapt(task)
    return found[0]


def moved(system: GradientSystem, state: dict[str, Tensor], unit: str) -> Tensor:
    """Return how far a unit went, per number."""
    fresh = system.model.fresh()
    return torch.cat([(state[name] - fresh[name]).flatten() for name in fresh if name.startswith(f"{unit}|")])


# ---------------------------------------------------------------------- Auto-RGN


def test_auto_rgn_rates_are_relative_gradient_norms(
    learner: ModularMetaLearner, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    system: AutoRGN = build("auto_rgn", learner, units=LAYERS, steps=1, rate=0.01)
    state = states(system, task, monkeypatch)
    with trainable(learner) as parameters:
        support_loss(learner, task).backward()
        ratios = {}
        for unit in system.model.units:
            (site,) = unit.sites
            own = [parameters[f"{site.name}.{name}"] for name in site.shapes if f"{site.name}.{name}" in parameters]
            slope = torch.cat([p.grad.flatten() for p in own]).norm()  # type: ignore[union-attr]
            ratios[unit.name] = float(slope / torch.cat([p.detach().flatten() for p in own]).norm())
    assert min(ratios.values()) < 0.5 * max(ratios.values())
    for unit, ratio in ratios.items():
        # Adam's first step has the size of the rate wherever the gradient is well above its epsilon.
        step = float(moved(system, state, unit).abs().max())
        assert step == pytest.approx(0.01 * ratio / max(ratios.values()), rel=1e-3)


def test_auto_rgn_refuses_units_that_change_no_weight(learner: ModularMetaLearner) -> None:
    with pytest.raises(ModmetaError, match="changes no weight"):
        build("auto_rgn", learner, units=[UnitConfig("projection")])


# ---------------------------------------------------------------------- TinyTrain


def direct_potentials(learner: ModularMetaLearner, task: Task, names: list[str]) -> dict[str, float]:
    """Return the Fisher potentials of some layers, by hooks on the model itself."""
    model = learner.model.backbone.model
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            output.retain_grad()
            outputs[name] = output
            return output.clone()  # an activation may work in place

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with trainable(learner):
        support_loss(learner, task).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, a in outputs.items():
        assert a.grad is not None
        total = 0.0
        for image in range(len(a)):
            for channel in range(a.shape[1]):
                total += float((a[image, channel] * a.grad[image, channel]).detach().sum()) ** 2
        found[name] = total / (2 * len(a))
    return found


def test_tiny_train_takes_the_best_information_for_its_price(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task()
    system: TinyTrain = build("tiny_train", learner, units=LAYERS, budget=0.7, parameters=0.3)
    units = {unit.sites[0].name: unit for unit in system.model.units}
    expected = direct_potentials(learner, task, list(units))
    with torch.no_grad():
        found = system.potentials(task, list(units.values()))
    assert found == pytest.approx([expected[name] for name in units], rel=1e-3)
    # The greedy choice, by plain sums over the model's layers.
    backbone = learner.model.backbone
    total = sum(p.numel() for p in backbone.parameters())
    sizes = {
        name: sum(p.numel() for n, p in backbone.model.get_submodule(name).named_parameters() if "." not in n)
        for name in units
    }
    macs = {name: unit.sites[0].macs for name, unit in units.items()}
    score = {name: expected[name] / (sizes[name] * macs[name]) for name in units}
    chosen: set[str] = set()
    for name in sorted(units, key=lambda name: -score[name]):
        attempt = chosen | {name}
        cut = backbone.cut_before(attempt)
        share = backbone.macs(cut) / backbone.macs()
        if share <= 0.7 and sum(sizes[n] for n in attempt) <= 0.3 * total:
            chosen = attempt
    with torch.no_grad():
        kept = system.chosen(list(units.values()), found)
    assert {unit.sites[0].name for unit in kept} == chosen
    assert 0 < len(chosen) < len(units)


def test_tiny_train_refuses_layers_without_macs(learner: ModularMetaLearner) -> None:
    with pytest.raises(ModmetaError, match="without multiply-accumulates"):
        build("tiny_train", learner, units=FILM)


# ---------------------------------------------------------------------- by place, by chance, by constants


def test_sparse_update_moves_the_last_units_alone(
    learner: ModularMetaLearner, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    system: SparseUpdate = build("sparse_update", learner, units=LAYERS, last=3, steps=1)
    state = states(system, task, monkeypatch)
    moving = [unit.sites[0].order for unit in system.model.units if bool(moved(system, state, unit.name).any())]
    assert sorted(moving) == sorted(unit.sites[0].order for unit in system.model.units)[-3:]
    with torch.no_grad():
        outcome = system.adapt(task)
    last = sorted(system.model.units, key=lambda unit: unit.sites[0].order)[-3:]
    assert outcome.parameters == sum(unit.cost.parameters for unit in last)
    behind = learner.model.backbone.macs(learner.model.backbone.cut_before([last[0].sites[0].name]))
    assert outcome.backward_macs == 2 * behind * len(task.support.images)


def test_random_gates_cost_the_same_in_every_episode(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    system: RandomGates = build("random_gates", learner, units=LAYERS, budget=0.6, share=0.5, steps=1)
    drawn = [[unit.name for unit in system.drawn(make_task(index))] for index in range(20)]
    images = [len(make_task(index).support.images) for index in range(3)]
    with torch.no_grad():
        costs = {system.adapt(make_task(index)).backward_macs / images[index] for index in range(3)}
    assert len(costs) == 1
    assert costs.pop() <= 0.6 * 2 * learner.model.backbone.macs()
    assert len({tuple(names) for names in drawn}) > 10
    assert drawn == [[unit.name for unit in system.drawn(make_task(index))] for index in range(20)]
    # No unit that would cost more lies within; the next earlier one would.
    earlier = [u for u in system.model.units if u.depth < system.within[0].depth]
    assert all(backward_macs(system.model, [u], 1) > 0.6 * 2 * learner.model.backbone.macs() for u in earlier)
    assert np.mean([len(names) - 1 for names in drawn]) == pytest.approx(0.5 * (len(system.within) - 1), rel=0.3)
    with pytest.raises(ModmetaError, match="within the budget"):
        build("random_gates", learner, units=LAYERS, budget=0.0)


def test_constant_is_the_inner_loop_at_the_configured_gates_and_rates(
    learner: ModularMetaLearner, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    units = [UnitConfig("norm_blend", gate=0.3), UnitConfig("film", gate=0.6, rate=0.03)]
    system: Constant = build("constant", learner, units=units, steps=2, factor=2.0)
    model = system.model
    idle = system.plan({}, {}, 2)
    plan = replace(
        idle,
        gates=torch.tensor([unit.gate for unit in model.units]),
        rates=torch.tensor([[2 * unit.rate] * 2 for unit in model.units]),
    )
    expected, _ = inner_loop(
        model, model.fresh(), plan, task.support.images, lambda x: learner.inner_loss(x, task.support).mean()
    )
    state = states(system, task, monkeypatch)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert any(unit.reads for unit in model.units)


@pytest.mark.parametrize("name", ["constant", "fine_tune", "lp_ft"])
def test_the_unadapted_model_has_its_share(name: str, learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task()
    units = [UnitConfig("film", gate=0.6, rate=0.03)]
    logits = {}
    with torch.no_grad():
        for share in (0.0, 0.3, 1.0):
            outcome = build(name, learner, units=units, prior_share=share).adapt(task)
            logits[share] = outcome.classify(task)
        prior = build("head", learner).adapt(task).classify(task)
    torch.testing.assert_close(logits[1.0], prior)
    torch.testing.assert_close(logits[0.3], 0.7 * logits[0.0] + 0.3 * prior, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0.0], prior, atol=1e-2)
    with pytest.raises(ModmetaError, match="prior_share"):
        build(name, learner, units=units, prior_share=1.5)


def test_constant_tries_strengths_as_the_learner_does(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task()
    units = [UnitConfig("norm_blend", gate=0.2), UnitConfig("film", gate=0.5, rate=0.02)]
    losses, logits = {}, {}
    readout = ClosedForm(task, learner.head)
    for factor in (0.0, 1.0, 3.0):
        scaled = [replace(units[0], gate=0.2 * factor), units[1]]
        system: Constant = build("constant", learner, units=scaled, prior_share=0.5)
        gates = {name: gate for name, gate in system.gates().items() if "norm_blend" in name}
        with torch.no_grad():
            state = read_statistics(system.model, system.initial(task), system.plan(gates, {}, 0), task.support.images)
            after = readout.held_out(system.model(task.support.images, state, gates))
            losses[factor] = readout.losses((after + readout.held_out(task.features)) / 2)
        logits[factor] = system.adapt(task).classify(task)
    assert len({float(loss.mean()) for loss in losses.values()}) == 3
    tried = build("constant", learner, units=units, prior_share=0.5, statistics_strengths=[0.0, 1.0, 3.0]).adapt(task)
    best = min(losses, key=lambda factor: float(losses[factor].mean()))
    gap = losses[1.0] - losses[best]
    best = best if float(gap.mean()) > float(gap.std()) / len(gap) ** 0.5 else 1.0
    torch.testing.assert_close(tried.classify(task), logits[best], rtol=1e-4, atol=1e-5)
    with pytest.raises(ModmetaError, match="statistics_strengths"):
        build("constant", learner, units=units, statistics_strengths=[-1.0])


def test_constant_reads_down_to_the_depth_that_the_support_asks_for(
    learner: ModularMetaLearner, make_task: MakeTask
) -> None:
    task = make_task()
    units = [UnitConfig("norm_blend", gate=0.6), UnitConfig("film", gate=0.5, rate=0.02)]
    both: Constant = build("constant", learner, units=units, statistics_depths=[0.3, 1.0])
    alone = {depth: build("constant", learner, units=units, statistics_depths=[depth]) for depth in (0.3, 1.0)}
    assert both.gates() == alone[0.3].gates()
    assert both.gates(1.0) == alone[1.0].gates() == build("constant", learner, units=units).gates()
    assert set(both.gates()) < set(both.gates(1.0))
    readout, losses = ClosedForm(task, learner.head), {}
    for depth, system in alone.items():
        gates = {name: gate for name, gate in system.gates().items() if "norm_blend" in name}
        with torch.no_grad():
            state = read_statistics(system.model, system.initial(task), system.plan(gates, {}, 0), task.support.images)
            losses[depth] = readout.losses(readout.held_out(system.model(task.support.images, state, gates)))
    gap = losses[0.3] - losses[1.0]
    sure = float(gap.mean()) > float(gap.std()) / len(gap) ** 0.5
    expected = alone[1.0 if sure else 0.3].adapt(task).classify(task)
    torch.testing.assert_close(both.adapt(task).classify(task), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0.3].adapt(task).classify(task), alone[1.0].adapt(task).classify(task), atol=1e-3)
    with pytest.raises(ModmetaError, match="statistics_depths"):
        build("constant", learner, units=units, statistics_depths=[])


def test_constant_tries_nothing_that_its_head_cannot_judge(
    learner: ModularMetaLearner, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [UnitConfig("norm_blend", gate=0.6)]
    tried: Constant = build("constant", learner, units=units, head="ridge", statistics_strengths=[0.0, 1.0])
    several = make_task()
    assert several.support.labels is not None
    first = torch.tensor([several.support.labels.tolist().index(label) for label in range(several.support.ways)])
    support = several.support.keeping(first)
    ids = several.episode.support_ids[first]
    episode = replace(several.episode, support=support.images, support_labels=support.labels, support_ids=ids)
    monkeypatch.setattr(tried, "_tuned", lambda task: {})
    assert tried.adapt(several).parameters == 0
    assert tried.adapt(Task(learner, episode, support)).parameters > 0


# ---------------------------------------------------------------------- fine-tuning and probes


def test_fine_tuning_is_the_optimiser_on_the_networks_own_weights(
    learner: ModularMetaLearner, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    system = build("fine_tune", learner, units=LAYERS, steps=1, rate=0.1, optimizer="sgd")
    state = states(system, task, monkeypatch)
    with trainable(learner) as parameters:
        support_loss(learner, task).backward()
        for unit in system.model.units:
            (site,) = unit.sites
            weight = parameters[f"{site.name}.weight"]
            size = float(weight.detach().square().mean().sqrt())
            # In units of the weight's size, so that its gradient counts that much more.
            expected = -0.1 * size * weight.grad  # type: ignore[operator]
            torch.testing.assert_close(
                state[f"{unit.name}|{site.name}|weight"], expected, rtol=1e-3, atol=1e-6, msg=site.name
            )


def test_linear_probe_is_scikit_learns_logistic_regression(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task()
    assert task.support.labels is not None
    with torch.no_grad():
        x, q = (learner.model.backbone(images) for images in (task.support.images, task.episode.query))
        center = torch.stack([x[task.support.labels == c].mean(0) for c in range(task.support.ways)]).mean(0)
        x, q = F.normalize(x - center, dim=1), F.normalize(q - center, dim=1)
        found = build("linear_probe", learner, anchored=False, strength=0.5).adapt(task).classify(task)
    model = LogisticRegression(C=1 / 0.5, tol=1e-8, max_iter=1000).fit(x.double().numpy(), task.support.labels.numpy())
    torch.testing.assert_close(found.softmax(1), torch.tensor(model.predict_proba(q.double().numpy())).float(),
                               rtol=1e-3, atol=1e-4)  # fmt: skip


def test_a_strong_anchored_probe_stays_at_the_sources_classifier(
    learner: ModularMetaLearner, make_task: MakeTask
) -> None:
    task = make_task()
    with torch.no_grad():
        bound = build("linear_probe", learner, strength=1e6).adapt(task).classify(task)
        expected = build("aligned", learner).adapt(task).classify(task)
    # Both centre on the support, whose classes have equally many images; the bias is free.
    difference = bound - expected
    torch.testing.assert_close(difference - difference.mean(0), torch.zeros_like(bound), rtol=0, atol=1e-3)


def test_lp_ft_starts_at_the_probe_and_trains_it_on(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task()
    with torch.no_grad():
        probe = build("linear_probe", learner).adapt(task).classify(task)
        start = build("lp_ft", learner, units=FILM, steps=0).adapt(task).classify(task)
        after = build("lp_ft", learner, units=FILM, steps=3).adapt(task).classify(task)
    torch.testing.assert_close(start, probe, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, probe, atol=1e-3)
    with pytest.raises(ModmetaError, match="moves units only"):
        build("lp_ft", learner, units=FILM, optimizer="rms")


# ---------------------------------------------------------------------- without labels


@pytest.mark.parametrize(("name", "diversity"), [("tent", 0.0), ("shot_im", 1.0)])
def test_unlabelled_steps_descend_entropy(
    name: str, diversity: float, learner: ModularMetaLearner, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(labelled=False)
    system = build(name, learner, units=FILM, steps=1, rate=0.1, optimizer="sgd")
    state = states(system, task, monkeypatch)
    classifier = learner.sources.view(None).classifier(task.support.classes)
    with trainable(learner) as parameters:
        p = classifier(plain_features(learner, task.support.images)).softmax(1)
        loss = torch.distributions.Categorical(p).entropy().mean()
        loss = loss - diversity * torch.distributions.Categorical(p.mean(0)).entropy()
        loss.backward()
        for unit in system.model.units:
            for site in unit.sites:
                gamma, beta = (parameters[f"{site.name}.{part}"] for part in ("weight", "bias"))
                size = float(gamma.detach().square().mean().sqrt().clamp_min(0.1))
                for part, parameter in (("scale", gamma), ("shift", beta)):
                    expected = -0.1 * size * parameter.grad  # type: ignore[operator]
                    torch.testing.assert_close(state[f"{unit.name}|{site.name}|{part}"], expected, rtol=1e-3, atol=1e-6)


def test_diversity_keeps_predictions_apart(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task(labelled=False)
    spread = {}
    for name in ("tent", "shot_im"):
        with torch.no_grad():
            outcome = build(name, learner, units=FILM, steps=30, rate=0.05).adapt(task)
            own = Task(learner, replace(task.episode, query=task.support.images), task.support)
            mean = outcome.classify(own).softmax(1).mean(0)
        spread[name] = float(torch.distributions.Categorical(mean).entropy())
    assert spread["shot_im"] > spread["tent"] + 0.1
