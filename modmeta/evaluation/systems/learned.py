"""What meta-training learned: the checkpoint's own adaptation, or that of another checkpoint."""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeVar

from torch import Tensor, nn

from modmeta.adaptation import Adapted, Plan, Support, backward_macs, candidates, reading_units, stratified_folds
from modmeta.backbone import Backbone
from modmeta.backbone.fingerprint import fingerprint
from modmeta.errors import ModmetaError, unknown
from modmeta.evaluation.systems.system import Outcome, System, Task, register_system
from modmeta.learners import MetaLearner, ModularMetaLearner, load_learner

L = TypeVar("L", bound=MetaLearner)


@register_system("learner")
class LearnerSystem(System):
    """The adaptation of a checkpoint: the policy, or a rule that was meta-trained in its place.

    Args:
        overrides: arguments of the learner to set otherwise, such as ``{"veto": false}`` or ``{"budget": 0.3}``.
        shuffled: give the policy the indicators of another episode of the comparison.
        checkpoint: of a learner that was trained elsewhere on the same backbone and source domains, with whatever
            taps; by test domain, where the comparison tests one checkpoint per domain; None takes the tested one.
    """

    def __init__(
        self,
        overrides: dict[str, Any] | None = None,
        shuffled: bool = False,
        checkpoint: str | dict[str, str] | None = None,
    ) -> None:
        self.overrides = overrides or {}
        self.shuffled = shuffled
        self.checkpoint = checkpoint

    def prepare(self, learner: MetaLearner) -> None:
        """Load the other checkpoint, if there is one, and set the attributes.

        Raises:
            ModmetaError: if it is of another backbone or other sources, or if an override does not fit.
        """
        own = learner
        path = self._path(learner)
        if path is not None:
            own = load_learner(path).to(learner.device)
            _check_comparable(own, learner, path)
        if self.shuffled and not isinstance(own, ModularMetaLearner):
            raise ModmetaError("learner: only a ModularMetaLearner has indicators to shuffle; leave shuffled out")
        own = view_of(own)
        for name, value in self.overrides.items():
            _override(own, name, value)
        super().prepare(own)

    def _path(self, learner: MetaLearner) -> str | None:
        if not isinstance(self.checkpoint, dict):
            return self.checkpoint
        unseen = [path for domain, path in self.checkpoint.items() if domain not in learner.sources.domains]
        if len(unseen) != 1:
            sources = ", ".join(learner.sources.domains)
            raise ModmetaError(f"learner: name one checkpoint for the domain beside {sources}; there are {len(unseen)}")
        return unseen[0]

    def adapt(self, task: Task) -> Outcome:
        """Let the learner adapt."""
        learner = self.learner_for(task)
        adapted = learner.adapt(task.support)
        active = learner.model.active(adapted.plan.gate_of())
        return Outcome(
            lambda query: learner.logits(adapted, query.episode.query, query.query_ids),
            sum(unit.cost.parameters for unit in active),
            learner_backward_macs(learner, task.support, adapted),
        )

    def learner_for(self, task: Task) -> MetaLearner:
        """Return the learner that is to adapt to a task."""
        if not self.shuffled:
            return self.learner
        assert isinstance(self.learner, ModularMetaLearner)
        if task.another is None:
            raise ModmetaError("learner: shuffled needs another episode of the comparison, and there is none")
        learner = view_of(self.learner)
        learner._modules["indicators"] = FixedIndicators(*learner.indicators(learner.situate(task.another())))
        return learner


class FixedIndicators(nn.Module):
    """Indicators that do not depend on the situation."""

    needs: frozenset[str] = frozenset()
    backward_passes = 0

    def __init__(self, whole: Tensor, each: Tensor) -> None:
        super().__init__()
        self.values = whole, each

    def forward(self, situation: object, generator: object = None) -> tuple[Tensor, Tensor]:
        """Return the values, whatever the situation is."""
        return self.values


def learner_backward_macs(learner: MetaLearner, support: Support, adapted: Adapted) -> int:
    """Return the multiply-accumulates of all backward passes of an adaptation: indicators, veto and inner loop."""
    if support.labels is None:
        return 0
    model, count = learner.model, len(support.images)
    total = backward_macs(model, model.active(adapted.plan.gate_of()), count, adapted.plan.steps)
    if not isinstance(learner, ModularMetaLearner) or "privacy" in adapted.report:
        return total  # a private adaptation asks neither indicators nor veto
    total += backward_macs(model, model.units, count, learner.indicators.backward_passes)
    if learner.veto and learner.veto_folds:  # without folds it measures only plans that take no gradient
        plan = Plan.from_dict(adapted.report["plan"])
        folds = stratified_folds(support.labels, learner.veto_folds, learner.knows_classes(support))
        reading = [unit.name for unit in reading_units(model.units)]
        learning = adapted.report["wrong_labels"].get("learning", 1.0)
        for tried in candidates(plan, reading, learning).values():
            open_units = model.active(tried.gate_of())
            total += sum(backward_macs(model, open_units, len(rest), tried.steps) for rest, _ in folds)
    return total


def _weights(backbone: Backbone) -> str:
    return fingerprint(backbone.name.partition(".")[0], backbone.tensors(), backbone.preprocessing)


def view_of(learner: L) -> L:
    """Return a learner with the same parts whose attributes can be set without changing the original's."""
    view = copy.copy(learner)
    view._modules = dict(learner._modules)
    return view


def _override(learner: MetaLearner, name: str, value: Any) -> None:
    known = [each for each in inspect.signature(type(learner).__init__).parameters if each in vars(learner)]
    if name not in known:
        raise unknown("argument of the learner to override", name, known)
    before = getattr(learner, name)
    allowed = (int, float) if type(before) is float else (type(before),)
    if type(value) not in allowed:
        raise ModmetaError(f"overrides: {name} is {value!r}; give {allowed[-1].__name__}")
    setattr(learner, name, value)


def _check_comparable(own: MetaLearner, tested: MetaLearner, path: str) -> None:
    if len({_weights(learner.model.backbone) for learner in (own, tested)}) > 1:
        raise ModmetaError(f"checkpoint {path} has another backbone than the one that is tested; train it on the same")
    if set(own.sources.domains) != set(tested.sources.domains):
        raise ModmetaError(
            f"checkpoint {path} was trained on domains {', '.join(own.sources.domains)}, the one that is tested on "
            f"{', '.join(tested.sources.domains)}; give one of the same"
        )
