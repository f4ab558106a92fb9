"""A policy serves another backbone, other units and other data without being trained again."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from modmeta.adapters import UnitConfig
from modmeta.errors import ModmetaError
from modmeta.learners import BackboneConfig

OTHER = BackboneConfig("test_resnet", pretrained=False, image_size=32)


def test_a_policy_serves_another_backbone_and_other_units_untrained(fitted: tiny.Fitted, tmp_path: Path) -> None:
    units = [UnitConfig("film", group="stage")]
    made = tiny.modular(backbone=OTHER, units=units, policy_from=str(fitted.checkpoint))
    trainer, data = tiny.trainer(tmp_path, 1), tiny.digits(train_domains=["ink", "paper"])
    trainer.test(made, datamodule=data, verbose=False)
    for part in ("policy", "indicators", "head"):
        theirs = getattr(fitted.learner, part).state_dict()
        for name, mine in getattr(made, part).state_dict().items():
            assert torch.equal(mine, theirs[name]), (part, name)
    assert made.sources.domains == ("ink", "paper")
    assert {r.system for r in made.results} >= {"none", "adapted"}


def test_a_fit_goes_on_from_the_policy(fitted: tiny.Fitted, tmp_path: Path) -> None:
    made = tiny.modular(backbone=OTHER, policy_from=str(fitted.checkpoint), learning_rate=1e-9)
    tiny.trainer(tmp_path, 1).fit(made, datamodule=tiny.digits())
    theirs = fitted.learner.policy.state_dict()
    for name, mine in made.policy.state_dict().items():
        torch.testing.assert_close(mine, theirs[name], atol=1e-6, rtol=0, msg=name)
    assert torch.equal(made.indicators.center_unit, fitted.learner.indicators.center_unit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3}, "the policy of .* has other tensors"),
        ({"indicators": ["task", "place"]}, "sees the indicators task, .*this learner task, place"),
        ({"head": "ridge"}, "was trained with the head anchored_ridge, this learner has ridge"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_before_any_work(
    fitted: tiny.Fitted, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    made = tiny.modular(**({"policy_from": str(fitted.checkpoint)} | changes))
    with pytest.raises(ModmetaError, match=message) as caught:
        tiny.trainer(tmp_path, 1).test(made, datamodule=tiny.digits(), verbose=False)
    assert "\n" not in str(caught.value)
    assert not made.sources.ready


def test_a_checkpoint_without_a_policy_is_refused(tmp_path: Path) -> None:
    trainer, data = tiny.trainer(tmp_path, 1), tiny.digits()
    trainer.fit(tiny.head_only(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "head.ckpt")
    made = tiny.modular(policy_from=str(tmp_path / "head.ckpt"))
    with pytest.raises(ModmetaError, match="holds no policy"):
        tiny.trainer(tmp_path, 1).test(made, datamodule=data, verbose=False)


def test_one_start_at_a_time() -> None:
    with pytest.raises(ModmetaError, match="give one of them"):
        tiny.modular(policy_from="a", warm_start="b")


def test_an_untrained_backbone_is_no_use_to_a_policy(fitted: tiny.Fitted, tmp_path: Path) -> None:
    made = tiny.modular(source=tiny.source(), policy_from=str(fitted.checkpoint))
    with pytest.raises(ModmetaError, match="was not trained"):
        tiny.trainer(tmp_path, 1).test(made, datamodule=tiny.digits(), verbose=False)
