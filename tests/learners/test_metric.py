"""Metric learners: what they learn, what they are indifferent to, and what they refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from textbook import accuracies, assert_resumes, losses_of_a_fit, same, support_of, tensors

from modmeta.adaptation import Adapted
from modmeta.adapters import UnitConfig
from modmeta.errors import ModmetaError
from modmeta.learners import BackboneConfig, MetricLearner, load_learner

WHOLE = (UnitConfig("full"),)
METHODS: dict[str, dict[str, Any]] = {
    "prototypical": {"head": "prototypical"},
    "ridge": {"head": "ridge"},
    "matching": {"comparison": "matching"},
    "siamese": {"comparison": "siamese", "pair_loss": "logistic"},
    "nearest": {"comparison": "nearest", "pair_loss": "contrastive"},
    "relation": {"comparison": "relation", "comparison_options": {"hidden": 16}, "pair_loss": "mse"},
}


def metric(**changes: Any) -> MetricLearner:
    """Return a tiny metric learner whose whole network is its embedding."""
    options: dict[str, Any] = {
        "backbone": BackboneConfig("test_four_block", False, 28), "units": WHOLE, "source_images": 3,
        "learning_rate": 0.02,
    }  # fmt: skip
    torch.manual_seed(0)
    return MetricLearner(**(options | changes))


@pytest.mark.parametrize("method", METHODS)
def test_it_fits_episodes(method: str) -> None:
    losses = losses_of_a_fit(metric(**METHODS[method]), tiny.digits(image_size=28, shift_share=0.0), rate=0.02)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("method", ["prototypical", "siamese"])
def test_it_learns_to_tell_the_digits_apart(method: str, tmp_path: Path) -> None:
    data = tiny.digits(image_size=28, steps_per_epoch=40, shift_share=0.0)
    learner = metric(**METHODS[method])
    before = accuracies(learner, data)
    tiny.trainer(tmp_path, 1).fit(learner, datamodule=data)
    after = accuracies(learner, data)
    gain = after - before
    assert after.mean() > 0.5  # chance is 1/3
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_support_makes_no_difference(method: str) -> None:
    # Batch statistics of four blocks are the same in any order, too.
    learner = metric(**METHODS[method]).double()
    support, query, _ = support_of(tiny.digits(image_size=28))
    order = torch.tensor([5, 0, 3, 1, 4, 2])[: len(support.images)]
    turned = support.keeping(order)
    with torch.no_grad():
        one, other = (learner.logits(learner.adapt(s), query) for s in (support, turned))
    torch.testing.assert_close(one, other)


def test_without_units_only_what_compares_is_trained(tmp_path: Path) -> None:
    learner = metric(units=(), **METHODS["relation"])
    before = tensors(learner)
    tiny.trainer(tmp_path, 1).fit(learner, datamodule=tiny.digits(image_size=28))
    moved = {name.split(".")[0] for name, t in tensors(learner).items() if not torch.equal(t, before[name])}
    assert moved == {"comparison"}


def test_an_untrained_embedding_is_the_backbone() -> None:
    learner = metric()
    support, query, _ = support_of(tiny.digits(image_size=28))
    with torch.no_grad():
        ours = learner.logits(learner.adapt(support), query)
        head = learner.head.fit(learner.model.backbone(support.images), support.labels, support.ways)
        torch.testing.assert_close(ours, head(learner.model.backbone(query)))


def test_units_that_read_statistics_read_those_of_the_support() -> None:
    learner = metric(
        backbone=BackboneConfig("test_efficientnet", False, 32), units=(UnitConfig("norm_blend"), UnitConfig("film"))
    )
    support, query, _ = support_of(tiny.digits())
    adapted = learner.adapt(support)
    assert any("norm_blend" in name and bool(tensor.any()) for name, tensor in adapted.state.items())
    learner.logits(adapted, query).sum().backward()
    assert all(parameter.grad is not None for parameter in learner.bank.parameters())


@pytest.mark.parametrize("method", ["prototypical", "siamese"])
def test_a_fit_that_is_resumed_ends_where_a_whole_one_does(method: str, tmp_path: Path) -> None:
    assert_resumes(lambda: metric(**METHODS[method]), lambda: tiny.digits(image_size=28), tmp_path)


def test_a_checkpoint_brings_back_learner_and_comparison(tmp_path: Path) -> None:
    learner = metric(**METHODS["relation"])
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(learner, datamodule=tiny.digits(image_size=28))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_learner(tmp_path / "last.ckpt")
    assert type(again) is MetricLearner
    assert same(tensors(again), tensors(learner))


def test_only_linear_classifiers_become_adapter_files() -> None:
    support, query, _ = support_of(tiny.digits(image_size=28))
    with torch.no_grad():
        learner = metric(head="prototypical")
        adapted = learner.adapt(support)
        again = Adapted.from_file(adapted.to_file({}))
        assert torch.equal(learner.logits(again, query), learner.logits(adapted, query))
        with pytest.raises(ModmetaError, match="holds a linear classifier, which Compared is not"):
            metric(comparison="matching").adapt(support).to_file({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "anchored_ridge"}, "starts from a classifier of unadapted features"),
        ({"comparison": "matchin"}, "did you mean 'matching'"),
        ({"comparison": "relation", "comparison_options": {"hiden": 3}}, "did you mean 'hidden'"),
        ({"comparison": "relation", "comparison_options": {"hidden": 0}}, "hidden must be 1 or more"),
        ({"comparison": "matching", "comparison_options": {"scale": -1.0}}, "scale must be above 0"),
        ({"comparison_options": {"hidden": 3}}, "no comparison"),
        ({"pair_loss": "logistic"}, "needs a comparison"),
        ({"comparison": "siamese", "pair_loss": "contrastive"}, "needs distances"),
        ({"comparison": "nearest", "units": ()}, "nothing to learn"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModmetaError, match=message):
        metric(**options)


def test_unlabelled_images_are_refused() -> None:
    support, _, _ = support_of(tiny.digits(image_size=28))
    with pytest.raises(ModmetaError, match="sort the support into classes"):
        metric().adapt(replace(support, labels=None))
