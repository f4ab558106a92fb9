from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from modmeta.adapters import UnitConfig
from modmeta.data import Episode
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.learners import SupernetLearner, load_learner
from modmeta.learners.measuring import episode_support
from modmeta.learners.placements import Placements

UNITS = (
    UnitConfig("norm_blend", group="all", gate=0.3),
    UnitConfig("film", depth=(0.7, 1.0), rate=0.05),
    UnitConfig("bias", depth=(0.7, 1.0)),
    UnitConfig("projection", {"rank": 2}),
)


def supernet(**changes: Any) -> SupernetLearner:
    torch.manual_seed(0)
    return SupernetLearner(**({"backbone": tiny.BACKBONE, "units": UNITS, "source_images": 5, "steps": 1} | changes))


def episode(index: int = 0) -> Episode:
    data = tiny.digits()
    data.setup("fit")
    return data.episode("train", index)


def test_units_of_a_group_compete_for_its_place() -> None:
    placements = supernet().placements
    assert dict(zip(placements.places, placements.choices, strict=True)) == {
        "all": ((), ("norm_blend@all",)),
        "s4": ((), ("film@s4",), ("bias@s4",)),
        "features": ((), ("projection@features",)),
    }
    assert placements.open((0, 2, 1)) == ("bias@s4", "projection@features")
    both = supernet(at_once=2).placements
    assert both.choices[1] == ((), ("film@s4",), ("bias@s4",), ("film@s4", "bias@s4"))
    assert both.within(["film@s4", "projection@features"]).choices == (
        ((),), ((), ("film@s4",)), ((), ("projection@features",)),
    )  # fmt: skip


def test_two_units_of_a_kind_and_group_compete_too() -> None:
    units = (UnitConfig("film", depth=(0.7, 1.0)), UnitConfig("film", depth=(0.7, 1.0), rate=0.1))
    placements = Placements.of(supernet(units=units).model.units)
    assert placements.choices == (((), ("film@s4",), ("film@s4#2",)),)


def test_draws_are_uniform() -> None:
    placements = supernet().placements
    random = np.random.default_rng(0)
    draws = [placements.draw(random) for _ in range(3000)]
    for place, size in enumerate(placements.sizes):
        counts = np.bincount([genome[place] for genome in draws], minlength=size)
        assert abs(counts - 3000 / size).max() < 5 * (3000 / size) ** 0.5


def test_a_path_opens_its_units_alone_with_constant_rates() -> None:
    learner = supernet(steps=2)
    plan = learner.path_plan(["norm_blend@all", "film@s4"])
    assert {name: round(float(gate), 6) for name, gate in plan.gate_of().items()} == {
        "norm_blend@all": 0.3, "film@s4": 1.0,
    }  # fmt: skip
    assert plan.rates[plan.index("film@s4")].tolist() == pytest.approx([0.05, 0.05])


def test_an_episode_trains_the_units_of_its_own_path() -> None:
    learner = supernet()
    paths = set()
    for index in range(4):
        task = episode(index)
        names = learner.placements.open(learner.placements.draw(rng(0, "path", index)))
        loss = learner.episode_loss(task)
        assert torch.equal(loss, learner.query_loss(learner.path_logits(names, task), task.query_labels))
        found = torch.autograd.grad(loss, list(learner.bank.prior), allow_unused=True)
        trained = {n.partition("|")[0] for n, g in zip(learner.bank.names, found, strict=True) if g is not None}
        assert trained == {name for name in names if not name.startswith("norm_blend")}
        paths.add(names)
    assert len(paths) > 1


def test_the_empty_path_is_the_unadapted_model() -> None:
    learner, task = supernet(), episode()
    support = episode_support(task, hide=False)
    plain = learner.fit_head(learner.prior_features(support.images), support)(learner.prior_features(task.query))
    assert torch.equal(learner.path_logits((), task), plain)
    assert not torch.equal(learner.path_logits(("film@s4",), task), plain)


def test_a_measurement_leaves_what_is_open_alone(checkpoint: Path) -> None:
    learner, task = load_learner(checkpoint), episode()
    before = learner.open
    with torch.no_grad():
        shares = {learner.evaluate(replace(task, index=index))[1]["adapted"]["units_updated"] for index in range(6)}
    assert learner.open is before
    assert len(shares) > 1, "episodes go along paths of their own"


def test_it_fits_some_episodes() -> None:
    learner = supernet(learning_rate=0.02)
    tasks, parameters = [episode(index) for index in range(3)], learner.meta_parameters()
    (optimizer,) = learner.configure_optimizers()
    losses = []
    for _ in range(8):
        loss, gradients = learner.meta_gradient(tasks, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"units": ()}, "needs candidates"), ({"steps": 0}, "steps must be 1"), ({"at_once": 0}, "at_once must be 1")],
)
def test_settings_that_make_no_sense(change: dict, message: str) -> None:
    with pytest.raises(ModmetaError, match=message):
        supernet(**change)
