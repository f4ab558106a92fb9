"""What every system must keep to, and the relations that are known between some of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import modmeta
from modmeta.adaptation import HEADS, Classifier
from modmeta.adapters import UnitConfig
from modmeta.commands.compare import read_settings
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems import SYSTEMS, System, Task
from modmeta.learners import ModularMetaLearner, load_learner

MakeTask = Callable[..., Task]
FILM = [UnitConfig("film")]
LAYERS = [UnitConfig("full", kinds=["conv", "dwconv", "pwconv"], group="site")]
LAST = [UnitConfig("full", depth=(0.6, 1.0))]
TENT = [UnitConfig("norm_blend", group="all", gate=1.0), UnitConfig("film")]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "source": ("source", {}),
    "aligned": ("aligned", {}),
    "own head": ("head", {}),
    **{name: ("head", {"head": name}) for name in HEADS.names()},
    "statistics": ("statistics", {"gate": 0.3}),
    "hand rule": ("hand_rule", {}),
    "film": ("fine_tune", {"units": FILM, "steps": 3}),
    "film, rms": ("fine_tune", {"units": FILM, "steps": 2, "rate": 0.02, "optimizer": "rms"}),
    "film, sgd": ("fine_tune", {"units": FILM, "steps": 2, "optimizer": "sgd"}),
    "lora": ("fine_tune", {"units": [UnitConfig("lora", kinds=["pwconv"])], "steps": 2, "head": "ridge"}),
    "residual": ("fine_tune", {"units": [UnitConfig("residual")], "steps": 2, "optimizer": "adadelta", "rate": 0.5}),
    "full": ("fine_tune", {"units": LAYERS, "steps": 2, "rate": 0.001}),
    "linear probe": ("linear_probe", {}),
    "lp_ft": ("lp_ft", {"units": LAST, "steps": 2}),
    "auto_rgn": ("auto_rgn", {"units": LAYERS, "steps": 2}),
    "tiny_train": ("tiny_train", {"units": LAYERS, "steps": 2}),
    "sparse_update": ("sparse_update", {"units": LAYERS, "last": 3, "steps": 2}),
    "random_gates": ("random_gates", {"units": LAYERS, "steps": 2, "budget": 0.6}),
    "constant": ("constant", {"units": [UnitConfig("norm_blend", gate=0.2), UnitConfig("film", gate=0.5)]}),
    "tent": ("tent", {"units": TENT, "steps": 2}),
    "shot_im": ("shot_im", {"units": LAST, "steps": 2, "aligned": True}),
    "learner": ("learner", {}),
    "learner with veto": ("learner", {"overrides": {"veto": True, "budget": 0.7}}),
    "shuffled": ("learner", {"shuffled": True}),
    "flute": ("flute", {"steps": 2}),
}
UNTUNED = {"source", "aligned", "own head", *HEADS.names(), "statistics", "hand rule", "linear probe"}
MAY_STAY = {"hand rule", "learner with veto"}  # may end where nothing is changed


def build(name: str, learner: ModularMetaLearner, **options: Any) -> System:
    system = SYSTEMS.get(name)(**options)
    system.prepare(learner)
    return system


@torch.no_grad()
def logits_of(system: System, task: Task) -> Tensor:
    return system.adapt(task).classify(task)


@pytest.fixture
def with_specialists(learner: ModularMetaLearner) -> Any:
    """The learner with a specialist for two of its source domains."""
    generator = torch.Generator().manual_seed(0)
    for row, domain in enumerate(learner.sources.domains[:2]):
        state = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in learner.model.fresh().items()
        }
        learner.bank.add(domain, state, learner.sources.mean[row])
    yield learner
    for domain in learner.sources.domains[:2]:
        learner.bank.remove(domain)


def test_every_system_has_a_case() -> None:
    assert {name for name, _ in CASES.values()} == set(SYSTEMS.names())


@pytest.mark.parametrize("case", CASES)
def test_adapts_without_the_query_and_leaves_the_backbone_alone(
    case: str, with_specialists: ModularMetaLearner, make_task: MakeTask
) -> None:
    learner, (name, options) = with_specialists, CASES[case]
    fingerprint = learner.model.backbone.fingerprint()
    kept = {key: tensor.clone() for key, tensor in learner.state_dict().items() if isinstance(tensor, Tensor)}
    system = build(name, learner, **options)
    task, other = make_task(0), make_task(1)
    with torch.no_grad():
        outcome = system.adapt(make_task(0, blind=True))
        logits = outcome.classify(task)
        system.adapt(other)
        again = build(name, learner, **options).adapt(make_task(0))
    assert logits.shape == (len(task.episode.query), task.support.ways)
    assert bool(torch.isfinite(logits).all())
    assert torch.equal(outcome.classify(task), logits)  # whatever was adapted to since
    assert torch.equal(again.classify(task), logits)
    assert not logits.requires_grad
    assert learner.model.backbone.fingerprint() == fingerprint
    assert all(torch.equal(tensor, learner.state_dict()[key]) for key, tensor in kept.items())
    assert all(parameter.grad is None for parameter in learner.parameters())
    assert (outcome.backward_macs > 0) == (case not in UNTUNED)
    if case not in MAY_STAY:
        assert (outcome.parameters > 0) == (case not in UNTUNED or case == "statistics")


@pytest.mark.parametrize("case", CASES)
def test_a_support_without_labels_is_enough(
    case: str, with_specialists: ModularMetaLearner, make_task: MakeTask
) -> None:
    name, options = CASES[case]
    system = build(name, with_specialists, **options)
    with torch.no_grad():
        outcome = system.adapt(make_task(0, blind=True, labelled=False))
        logits = outcome.classify(make_task(0))
    assert bool(torch.isfinite(logits).all())
    if name in ("tent", "shot_im"):
        assert torch.equal(logits, logits_of(system, make_task(0)))  # labels change nothing
        assert outcome.backward_macs > 0
    else:
        assert outcome.backward_macs == 0


# ---------------------------------------------------------------------- known relations


def test_doing_nothing_is_the_head(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task()
    with torch.no_grad():
        support = task.support
        expected = learner.fit_head(learner.model.backbone(support.images), support)(
            learner.model.backbone(task.episode.query)
        )
    assert torch.equal(logits_of(build("head", learner), task), expected)
    for name, options in {
        "fine_tune": {"units": FILM, "steps": 0},
        "statistics": {"gate": 0.0},
        "constant": {"units": [UnitConfig("film", gate=0.0)]},
        "auto_rgn": {"units": LAYERS, "steps": 0},
        "tiny_train": {"units": LAYERS, "parameters": 0.0},
        "hand_rule": {"threshold": 1e9},
    }.items():
        system = build(name, learner, **options)
        torch.testing.assert_close(logits_of(system, task), expected, rtol=1e-4, atol=1e-5, msg=name)
    system = build("fine_tune", learner, units=FILM, steps=2, rate=0.0, head="anchored_ridge")
    other = build("head", learner, head="anchored_ridge")
    torch.testing.assert_close(logits_of(system, task), logits_of(other, task), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(other, task), expected)  # the learner's own strengths are others


def test_source_and_aligned_are_the_sources_classifiers(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task()
    view = learner.sources.view(None)
    with torch.no_grad():
        x, q = (learner.model.backbone(images) for images in (task.support.images, task.episode.query))
    columns = [learner.sources.classes.index(name) for name in task.support.classes]
    unit = torch.nn.functional.normalize(q - view.mean.mean(0), dim=1)
    expected = view.scale * unit @ learner.sources.plain[0][:, columns]
    torch.testing.assert_close(logits_of(build("source", learner), task), expected)
    unit = torch.nn.functional.normalize(q - x.mean(0), dim=1)
    expected = view.scale * unit @ learner.sources.aligned[0][:, columns]
    torch.testing.assert_close(logits_of(build("aligned", learner), task), expected)
    strange = replace(task.support, classes=("a", "b", "c"))
    for name in ("source", "aligned"):
        with pytest.raises(ModmetaError, match="no source domain knows any class"):
            build(name, learner).adapt(Task(learner, task.episode, strange))


def test_the_hand_rule_blends_where_the_first_layers_see_a_shift(
    learner: ModularMetaLearner, make_task: MakeTask
) -> None:
    task = make_task()
    shift = direct_shift(learner, task, 0.2)
    blended, alone = (logits_of(build(name, learner), task) for name in ("statistics", "head"))
    assert not torch.allclose(blended, alone)
    for threshold, expected in ((0.99 * shift, blended), (1.01 * shift, alone)):
        found = logits_of(build("hand_rule", learner, threshold=threshold), task)
        torch.testing.assert_close(found, expected)
    with pytest.raises(ModmetaError, match="early"):
        build("hand_rule", learner, early=0.0)


def direct_shift(learner: ModularMetaLearner, task: Task, early: float) -> float:
    """Return the shift at the first share of the norm layers, by hooks on the model itself."""
    model = learner.model.backbone.model
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    seen: list[float] = []

    def read(module: Any, inputs: tuple[Tensor]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)
        deviation = module.running_var.sqrt()
        gap = ((x.mean(1) - module.running_mean) / deviation) ** 2 + (x.std(1, correction=0) / deviation - 1) ** 2
        seen.append(float(gap.mean()))

    handles = [norm.register_forward_pre_hook(read) for norm in norms]
    with torch.no_grad():
        model(learner.model.backbone.prepare(task.support.images))
    for handle in handles:
        handle.remove()
    first = seen[: max(1, round(early * len(norms)))]
    return sum(first) / len(first)


# ---------------------------------------------------------------------- the learner and its views


def test_the_learner_system_is_the_learner(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task()
    with torch.no_grad():
        expected = learner.logits(learner.adapt(task.support), task.episode.query)
    assert torch.equal(logits_of(build("learner", learner), task), expected)


def test_overrides_hold_for_the_system_alone(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task = make_task()
    system = build("learner", learner, overrides={"budget": 0.0})
    assert learner.budget == 1.0
    with torch.no_grad():
        assert system.adapt(task).backward_macs < build("learner", learner).adapt(task).backward_macs
    for overrides, message in (
        ({"vetoo": True}, "did you mean 'veto'"),
        ({"steps": 3}, "unknown argument"),
        ({"veto": 1}, "veto is 1; give bool"),
    ):
        with pytest.raises(ModmetaError, match=message):
            build("learner", learner, overrides=overrides)


def test_shuffled_indicators_are_those_of_the_other_episode(learner: ModularMetaLearner, make_task: MakeTask) -> None:
    task, other = make_task(0), make_task(1)
    with torch.no_grad():
        plan = learner.plan(learner.situate(other.support)).detach()
        state, _ = learner.carry_out(plan, task.support)
        gates = plan.gate_of()
        classifier: Classifier = learner.fit_head(
            learner.model(task.support.images, state, gates), task.support, ridge=plan.ridge
        )
        expected = classifier(learner.model(task.episode.query, state, gates))
    found = logits_of(build("learner", learner, shuffled=True), task)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModmetaError, match="another episode"):
        build("learner", learner, shuffled=True).adapt(Task(learner, task.episode, task.support))


@pytest.mark.parametrize("folds", [2, 0])
def test_backward_cost_of_the_learner_counts_every_pass(
    folds: int, learner: ModularMetaLearner, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = build("learner", learner, overrides={"veto": True, "veto_folds": folds})
    with torch.no_grad():
        learner.policy.per_unit.bias[0] += 10  # all gates open
    passes: list[int] = []
    real = torch.autograd.grad

    def counted(outputs: Tensor, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(inputs, Tensor):  # features, from which nothing goes back through the backbone
            passes.append(images[-1] if outputs.ndim == 0 else len(outputs))
        return real(outputs, inputs, *args, **kwargs)

    images: list[int] = []
    run = learner.model.backbone.run

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        images.append(len(x))
        return run(x, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(learner.model.backbone, "run", watched)
    try:
        with torch.no_grad():
            outcome = system.adapt(task := make_task())
    finally:
        with torch.no_grad():
            learner.policy.per_unit.bias[0] -= 10
    backbone = learner.model.backbone
    behind = backbone.macs(learner.model.cut_before([unit for unit in learner.model.units if unit.learns]))
    # The halves that the indicators compare, and what either fold leaves.
    assert folds == 0 or set(passes) == {len(task.support.images) // 2}
    assert outcome.backward_macs == 2 * behind * sum(passes)


def test_flute_blends_by_how_near_the_domains_are(with_specialists: ModularMetaLearner, make_task: MakeTask) -> None:
    learner, task = with_specialists, make_task()
    near, far = learner.sources.domains[:2]
    own = learner.bank.means[near]
    with torch.no_grad():
        mean = learner.model.backbone(task.support.images).mean(0)
    learner.bank.means[near], learner.bank.means[far] = mean, mean + 1e3
    try:
        state = build("flute", learner).initial(make_task())  # type: ignore[attr-defined]
        for name, tensor in learner.bank.specialist(near).items():
            torch.testing.assert_close(state[name], tensor)
        learner.bank.means[far] = mean
        state = build("flute", learner).initial(make_task())  # type: ignore[attr-defined]
        for name, tensor in learner.bank.specialist(near).items():
            torch.testing.assert_close(state[name], (tensor + learner.bank.specialist(far)[name]) / 2)
    finally:
        learner.bank.means[near] = own


def test_flute_needs_specialists(learner: ModularMetaLearner) -> None:
    with pytest.raises(ModmetaError, match="no specialist"):
        build("flute", learner)


def test_another_checkpoint_adapts_in_its_own_way(
    learner: ModularMetaLearner, make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tiny.modular(rule="alfa", veto=False)
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(elsewhere, datamodule=tiny.digits())
    path = str(tmp_path / "alfa.ckpt")
    trainer.save_checkpoint(path)
    tested = load_learner(path)
    assert isinstance(tested, ModularMetaLearner)
    assert bool(tested.rule.network[-1].bias.any())  # type: ignore[index, union-attr]  # meta-training has reached it
    task = make_task(of=tested)
    with torch.no_grad():
        expected = tested.logits(tested.adapt(task.support), task.episode.query)
    assert torch.equal(logits_of(build("learner", tested, checkpoint=path), task), expected)
    by_domain = {"elsewhere": path, tested.sources.domains[0]: "missing.ckpt"}
    assert torch.equal(logits_of(build("learner", tested, checkpoint=by_domain), task), expected)
    with pytest.raises(ModmetaError, match=r"name one checkpoint for the domain beside .*; there are 2"):
        build("learner", tested, checkpoint={"elsewhere": path, "nowhere": path})
    with pytest.raises(ModmetaError, match="has another backbone"):
        build("learner", learner, checkpoint=path)
    monkeypatch.setattr(tested.sources, "domains", ("ink", *tested.sources.domains[1:]))
    with pytest.raises(ModmetaError, match="was trained on domains"):
        build("learner", tested, checkpoint=path)


SHIPPED = sorted((Path(modmeta.__file__).parents[1] / "configs" / "compare").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_comparison_is_accepted(path: Path) -> None:
    comparison, systems, *_ = read_settings(["--config", str(path)])
    assert set(systems) == set(comparison.systems)


def test_the_configuration_for_pacs_builds_every_system() -> None:
    path = Path(modmeta.__file__).parents[1] / "configs" / "compare" / "pacs.yaml"
    comparison, systems, *_ = read_settings(["--config", str(path)])
    assert set(systems) == set(comparison.systems)
    named = {options["system"] for options in comparison.systems.values()}
    assert named | {"flute"} == set(SYSTEMS.names())  # no run of configs/pacs.yaml makes specialists
