"""A system: anything that adapts to the support of an episode and then classifies its query."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from modmeta.adaptation import SourceView, Support
from modmeta.data import Episode
from modmeta.learners import MetaLearner
from modmeta.learners.measuring import episode_ids
from modmeta.registry import Registry

SYSTEMS: Registry[type[System]] = Registry("system")
register_system = SYSTEMS.register


class Task:
    """One episode as every system sees it, with what the systems may share computed once.

    Args:
        learner: gives the frozen backbone, the knowledge of the source domains and the feature cache.
        episode: the images.
        support: its support as the systems are given it: with wrong labels, or without any, where the
            comparison asks for that.
        another: gives the support of another episode of the same comparison, always the same one for this
            episode; None where there is no other.
    """

    def __init__(
        self,
        learner: MetaLearner,
        episode: Episode,
        support: Support,
        another: Callable[[], Support] | None = None,
    ) -> None:
        self.learner = learner
        self.episode = episode
        self.support = support
        self.another = another
        self._support_ids: Tensor | None
        self.query_ids: Tensor | None
        self._support_ids, self.query_ids = episode_ids(episode)
        """Rows of the image store whose pixels the images are; None where no row's pixels are."""
        self.forward_images = 0
        """Support images that the running system has had frozen features of; they are charged to its time."""

    @property
    def sources(self) -> SourceView:
        """What may be known of the source domains in this episode."""
        return self.learner.sources.view(self.support.hidden)

    @property
    def features(self) -> Tensor:
        """Support features ``(S, D)`` of the unadapted backbone."""
        self.forward_images = len(self.support.images)
        return self._features

    @cached_property
    def query_features(self) -> Tensor:
        """Query features ``(Q, D)`` of the unadapted backbone."""
        return self.learner.prior_features(self.episode.query, self.query_ids)

    @cached_property
    def _features(self) -> Tensor:
        return self.learner.prior_features(self.support.images, self._support_ids)


@dataclass(frozen=True)
class Outcome:
    """What a system made of a support set.

    Attributes:
        classify: from the task, whose labels it must not look at, to query logits ``(Q, C)``.
        parameters: numbers of the network that were updated, the head aside.
        backward_macs: multiply-accumulates of all backward passes through the backbone.
    """

    classify: Callable[[Task], Tensor]
    parameters: int = 0
    backward_macs: int = 0


class System(ABC):
    """One way to adapt; its options are the arguments of its constructor.

    A subclass is registered by name, so that configurations can name it, and implements :meth:`adapt`.
    """

    def prepare(self, learner: MetaLearner) -> None:
        """Build what depends on the backbone and the source domains; called once per learner."""
        self.learner = learner

    @abstractmethod
    def adapt(self, task: Task) -> Outcome:
        """Adapt to the support of a task; this is what is timed. The query must not be touched."""
