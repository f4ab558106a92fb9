"""The source domains' own classifier, without or with one look at the new images."""

from __future__ import annotations

from modmeta.adaptation import Anchor
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems.system import Outcome, System, Task, register_system


@register_system("source")
class Source(System):
    """The source domains' classifier as it is; it looks at no support image."""

    def adapt(self, task: Task) -> Outcome:
        """Return the sources' classifier for the episode's classes."""
        known_anchor(task)
        classifier = task.sources.classifier(task.support.classes)
        return Outcome(lambda query: classifier(query.query_features))


@register_system("aligned")
class Aligned(System):
    """The source domains' classifier, re-centred on the mean feature of the support; needs no labels."""

    def adapt(self, task: Task) -> Outcome:
        """Move the classifier to the support's mean."""
        classifier = known_anchor(task).classifier(task.sources.scale, task.features.mean(0))
        return Outcome(lambda query: classifier(query.query_features))


def known_anchor(task: Task) -> Anchor:
    """Return the sources' classifier for the classes of a task.

    Raises:
        ModmetaError: if the sources know none of them.
    """
    anchor = task.sources.anchor(task.support.classes)
    if not bool(anchor.known.any()):
        raise ModmetaError(
            f"no source domain knows any class of the episode ({', '.join(task.support.classes[:3])}, ...), so the "
            f"source classifier says nothing here; leave it out"
        )
    return anchor
