"""The amortised learner: what it generates, what it is indifferent to, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from textbook import assert_resumes, losses_of_a_fit, same, support_of, tensors

from modmeta.adaptation import Adapted
from modmeta.adapters import UnitConfig
from modmeta.errors import ModmetaError
from modmeta.learners import AmortizedLearner, BackboneConfig, load_learner

FILM = (UnitConfig("film", group="stage"),)


def amortized(**changes: Any) -> AmortizedLearner:
    """Return a tiny amortised learner."""
    options: dict[str, Any] = {
        "backbone": tiny.BACKBONE, "units": FILM, "source_images": 3, "hidden": 8, "learning_rate": 1e-2,
    }  # fmt: skip
    torch.manual_seed(0)
    return AmortizedLearner(**(options | changes))


def generating(**changes: Any) -> AmortizedLearner:
    """Return one whose generator is no longer zero."""
    learner = amortized(**changes)
    with torch.no_grad():
        for parameter in learner.generator.parameters():
            parameter.normal_(std=0.05)
    return learner


@pytest.mark.parametrize("module", ["film", "lora", "projection", "bias"])
def test_untrained_it_is_the_head_on_unadapted_features(module: str) -> None:
    learner = amortized(units=(UnitConfig(module),))
    support, query, _ = support_of(tiny.digits())
    with torch.no_grad():
        expected = learner.fit_head(learner.prior_features(support.images), support)(learner.prior_features(query))
        torch.testing.assert_close(learner.logits(learner.adapt(support), query), expected)


def test_it_fits_what_the_untrained_learner_does_not() -> None:
    learner = amortized(hidden=16)
    learner.head.requires_grad_(False)  # what falls is not for a better temperature
    losses = losses_of_a_fit(learner, tiny.digits(shift_share=0.0), rate=3e-3)
    assert losses[-1] < 0.8 * losses[0]


def test_what_it_generates_depends_on_the_support_but_not_on_its_order() -> None:
    learner = generating().double()
    data = tiny.digits()
    support, query, _ = support_of(data)
    other, _, _ = support_of(data, 1)
    order = torch.randperm(len(support.images), generator=torch.Generator().manual_seed(0))
    turned = support.keeping(order)
    with torch.no_grad():
        one, same_set, different = (learner.adapt(s) for s in (support, turned, other))
        names = learner.bank.names
        for name in names:
            torch.testing.assert_close(same_set.state[name], one.state[name])
        assert all(bool((one.state[n] != learner.bank.initial()[n]).any()) for n in names)
        assert any(not torch.allclose(one.state[n], different.state[n]) for n in names)
        torch.testing.assert_close(learner.logits(same_set, query), learner.logits(one, query))


def test_adapting_takes_no_gradient_and_what_is_learned_gets_one() -> None:
    learner = generating()
    support, query, _ = support_of(tiny.digits())
    with torch.no_grad():
        assert not any(tensor.requires_grad for tensor in learner.adapt(support).state.values())
    learner.logits(learner.adapt(support), query).square().mean().backward()
    for part in (learner.encoder, learner.generator, learner.bank):
        assert all(p.grad is not None and bool(p.grad.any()) for p in part.parameters()), type(part)
    assert all(parameter.grad is None for parameter in learner.model.backbone.parameters())


def test_an_adapter_file_holds_what_was_generated() -> None:
    learner = generating()
    support, query, _ = support_of(tiny.digits())
    with torch.no_grad():
        adapted = learner.adapt(support)
        again = Adapted.from_file(adapted.to_file({}))
        assert torch.equal(learner.logits(again, query), learner.logits(adapted, query))


def test_a_fit_that_is_resumed_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    assert_resumes(amortized, tiny.digits, tmp_path)


def test_a_checkpoint_brings_back_learner_and_generator(tmp_path: Path) -> None:
    learner = generating()
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(learner, datamodule=tiny.digits())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_learner(tmp_path / "last.ckpt")
    assert type(again) is AmortizedLearner
    assert same(tensors(again), tensors(learner))


@pytest.mark.parametrize("name", ["test_efficientnet_gn", "test_vit"])
def test_it_works_on_networks_with_other_norms(name: str) -> None:
    learner = generating(backbone=BackboneConfig(name, False, 32), units=(UnitConfig("film"),))
    support, query, _ = support_of(tiny.digits())
    with torch.no_grad():
        assert torch.isfinite(learner.logits(learner.adapt(support), query)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ()}, "there is none that learns; add film"),
        ({"units": (UnitConfig("norm_blend"),)}, "there is none that learns; add film"),
        ({"hidden": 0}, "hidden must be 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModmetaError, match=message):
        amortized(**options)
