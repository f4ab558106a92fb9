"""What a checkpoint says about itself, and what it is refused for."""

import dataclasses
from typing import Any

import pytest
import tiny
import torch

from modmeta.adapters import UnitConfig
from modmeta.errors import ModmetaError
from modmeta.learners import BackboneConfig, MetaLearner, load_learner
from modmeta.learners.checkpoint import check, describe, plain


def test_a_learner_takes_a_checkpoint_of_its_own_kind() -> None:
    found = describe(tiny.modular())
    check(found, tiny.modular(), weights=True)
    assert plain(found) == found


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("name", {"backbone": dataclasses.replace(tiny.BACKBONE, name="test_resnet")}, "another backbone: it has test_eff"),
    ("size", {"backbone": dataclasses.replace(tiny.BACKBONE, image_size=48)}, "another preprocessing: it has"),
    ("weights", {"backbone": dataclasses.replace(tiny.BACKBONE, seed=1)}, "another backbone fingerprint: it has sha"),
    ("units", {"units": tiny.UNITS[:2]}, "another set of units: it has"),
]


@pytest.mark.fault(24)
@pytest.mark.parametrize(("changes", "message"), [each[1:] for each in OTHERS], ids=[each[0] for each in OTHERS])
def test_another_backbone_or_set_of_units_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModmetaError, match=message) as caught:
        check(describe(tiny.modular()), tiny.modular(**changes), weights=True)
    assert "this model" in str(caught.value)


def test_weights_that_source_training_changed_are_brought_by_the_checkpoint() -> None:
    learner = tiny.head_only(source=tiny.source(), backbone=dataclasses.replace(tiny.BACKBONE, seed=1))
    check(describe(learner), tiny.head_only(source=tiny.source()), weights=True)


def test_a_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(ModmetaError, match="was not written by a modmeta learner"):
        check(None, tiny.head_only(), weights=True)


@pytest.mark.fault(29)
def test_a_tensor_of_another_shape_is_named_with_both_shapes() -> None:
    wide, narrow, fresh = (tiny.modular(units=[UnitConfig("lora", {"rank": rank}, group="all")]) for rank in (4, 2, 2))
    with pytest.raises(ModmetaError) as caught:
        narrow.load_state_dict(wide.state_dict())
    name = str(caught.value).partition("tensor ")[2].partition(" ")[0]
    there, here = (tuple(learner.state_dict()[name].shape) for learner in (wide, narrow))
    assert there != here
    assert f"has the shape {there} there, and {here} here" in str(caught.value)
    assert all(torch.equal(t, u) for t, u in zip(_tensors(narrow), _tensors(fresh), strict=True))  # nothing was loaded


def _tensors(learner: MetaLearner) -> list[torch.Tensor]:
    return [value for value in learner.state_dict().values() if isinstance(value, torch.Tensor)]


def test_arguments_in_a_checkpoint_run_no_code(fitted: tiny.Fitted, tmp_path: Any) -> None:
    checkpoint = torch.load(fitted.checkpoint, weights_only=True)
    canary = tmp_path / "canary"
    checkpoint["hyper_parameters"]["_instantiator"] = "os.mkdir"
    checkpoint["hyper_parameters"]["cache_dir"] = {"class_path": "os.mkdir", "init_args": {"path": str(canary)}}
    torch.save(checkpoint, tmp_path / "crafted.ckpt")
    with pytest.raises(ModmetaError, match=r"crafted\.ckpt"):
        load_learner(tmp_path / "crafted.ckpt")
    assert not canary.exists()


def test_a_saved_argument_is_plain_data() -> None:
    assert plain({"a": (BackboneConfig("x", False), 1)}) == {
        "a": [{"name": "x", "pretrained": False, "image_size": None, "seed": 0, "taps": []}, 1]
    }
