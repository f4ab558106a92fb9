"""Systems whose policy is not quite itself: told of another episode, of fewer indicators, or with one plan for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from policy_decisions import Cell, Decision, mean_plan
from torch import nn

from modmeta.adaptation import Plan, Policy
from modmeta.evaluation.systems import LearnerSystem, System, Task
from modmeta.evaluation.systems.learned import FixedIndicators, view_of
from modmeta.learners import ModularMetaLearner

Parts = Callable[[Task], Mapping[str, nn.Module]]
NO_VETO = ", no veto"


class Told(LearnerSystem):
    """The learner with parts of its policy put in the place of its own.

    Args:
        parts: from a task to the modules to replace, by attribute of the learner.
        veto: whether the veto may keep the prior.
    """

    def __init__(self, parts: Parts, veto: bool = True) -> None:
        super().__init__({} if veto else {"veto": False})
        self.parts = parts

    def learner_for(self, task: Task) -> ModularMetaLearner:
        """Return the learner with the parts of this task."""
        told = view_of(self.learner)
        assert isinstance(told, ModularMetaLearner)
        told._modules.update(self.parts(task))
        return told


class SamePlan(nn.Module):
    """A policy that has one plan for all."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, *situation: object) -> Plan:
        """Return the plan."""
        return self.plan


def tampered(
    learner: ModularMetaLearner, decisions: Mapping[Cell, Decision], tested: Sequence[str], others: Sequence[str]
) -> dict[str, System]:
    """Return the learner under indicators of other episodes and under constant plans, with the veto and without.

    Args:
        learner: the fitted learner.
        decisions: on the episodes of all domains.
        tested: the test domains.
        others: the other domains; each of their episodes serves one draw of a test domain.
    """
    own = [decision for decision in decisions.values() if decision.domain in tested]
    count = 1 + max(decision.draw for decision in own)

    def same_domain(task: Task) -> dict[str, nn.Module]:
        e = task.episode
        return {"indicators": FixedIndicators(*decisions[e.domain, e.shots, (e.index - 1) % count].indicators)}

    def other_domain(task: Task) -> dict[str, nn.Module]:
        draw, place = divmod(task.episode.index, len(others))
        return {"indicators": FixedIndicators(*decisions[others[place], task.episode.shots, draw].indicators)}

    mean = SamePlan(mean_plan(own))
    seen = learner.indicators
    untrained = Policy(seen.global_width, seen.unit_width, learner.policy.steps).eval()
    conditions: dict[str, Parts] = {
        "told of another episode": same_domain,
        "told of another domain": other_domain,
        "mean plan": lambda task: {"policy": mean},
        "configured plan": lambda task: {"policy": untrained},
    }
    found: dict[str, System] = {}
    for name, parts in conditions.items():
        found |= {name: Told(parts), name + NO_VETO: Told(parts, veto=False)}
    return found


def switched_off(learner: ModularMetaLearner, decisions: Mapping[Cell, Decision]) -> dict[str, System]:
    """Return the learner without each of its indicators, and with none but the one that says what the units are."""
    names = learner.indicators.names

    def without(hidden: Sequence[str]) -> System:
        keep = [
            torch.tensor([float(name not in hidden) for name, _ in learner.indicators.numbers(per_unit)])
            for per_unit in (False, True)
        ]

        def parts(task: Task) -> dict[str, nn.Module]:
            e = task.episode
            seen = decisions[e.domain, e.shots, e.index].indicators
            return {"indicators": FixedIndicators(*(x * kept for x, kept in zip(seen, keep, strict=True)))}

        return Told(parts)

    found = {f"without {name}": without([name]) for name in names}
    return found | {"without all but place": without([name for name in names if name != "place"])}
