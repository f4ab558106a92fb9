"""Taking over the policy of another learner: another backbone, other units or other data, the same decisions."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from modmeta.adaptation import Head, IndicatorSet, Policy, TrackRecord
from modmeta.errors import ModmetaError
from modmeta.learners.loading import read_checkpoint


def take_policy(
    path: str | Path, policy: Policy, indicators: IndicatorSet, head: Head, head_name: str, record: TrackRecord
) -> None:
    """Load the policy, its track record, the indicators' scales and the head's strengths from a checkpoint.

    None of these depends on a backbone, on units or on domains. Backbone, bank and sources of the checkpoint are left
    aside.

    Args:
        path: checkpoint of a modular learner.
        policy: takes the policy; as many steps and indicators as there.
        indicators: take the standardisation.
        head: takes the strengths.
        head_name: what it is registered as.
        record: takes the veto's track record.

    Raises:
        ModmetaError: if there is no policy in it, or it is of other indicators, steps or another head.
    """
    checkpoint = read_checkpoint(path)
    theirs = checkpoint["hyper_parameters"]
    if "indicators" not in theirs:
        raise ModmetaError(f"policy_from: {path} holds no policy; give a checkpoint of a ModularMetaLearner")
    if tuple(theirs["indicators"]) != indicators.names:
        raise ModmetaError(
            f"policy_from: the policy of {path} sees the indicators {', '.join(theirs['indicators'])}, "
            f"this learner {', '.join(indicators.names)}; give it the same"
        )
    if theirs["head"] != head_name:
        raise ModmetaError(
            f"policy_from: the policy of {path} was trained with the head {theirs['head']}, "
            f"this learner has {head_name}; give it the same"
        )
    parts: dict[str, nn.Module] = {"policy": policy, "indicators": indicators, "head": head, "record": record}
    for name, part in parts.items():
        own = {key.removeprefix(f"{name}."): value for key, value in checkpoint["state_dict"].items()
               if key.startswith(f"{name}.")}  # fmt: skip
        shapes = {key: tuple(value.shape) for key, value in part.state_dict().items()}
        if shapes != {key: tuple(value.shape) for key, value in own.items()}:
            raise ModmetaError(
                f"policy_from: the {name} of {path} has other tensors than this learner's; give it the same steps"
            )
        part.load_state_dict(own)
