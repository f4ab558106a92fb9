"""Closed-form heads on the frozen backbone: adapting without touching the network."""

from __future__ import annotations

from modmeta.adaptation import HEADS, Head
from modmeta.evaluation.systems.system import Outcome, System, Task, register_system
from modmeta.learners import MetaLearner


@register_system("head")
class HeadSystem(System):
    """A closed-form head on unadapted features. Without labels it is the sources' classifier, re-centred.

    Args:
        head: registered name; None takes the learner's own head with the strengths that it has learned.
        head_options: options of the head, such as ``{"ridge": 0.3}``.
    """

    def __init__(self, head: str | None = None, head_options: dict[str, float] | None = None) -> None:
        self.head_name = head
        self.head_options = head_options

    def prepare(self, learner: MetaLearner) -> None:
        """Make the head."""
        super().prepare(learner)
        self.head = make_head(learner, self.head_name, self.head_options)

    def adapt(self, task: Task) -> Outcome:
        """Fit the head to the support."""
        classifier = task.learner.fit_head(task.features, task.support, self.head)
        return Outcome(lambda query: classifier(query.query_features))


def make_head(learner: MetaLearner, name: str | None, options: dict[str, float] | None) -> Head:
    """Return a head by its registered name, or the learner's own for None."""
    if name is None:
        return learner.head
    head: Head = HEADS.get(name)(**(options or {}))
    return head.to(learner.device).requires_grad_(False)
