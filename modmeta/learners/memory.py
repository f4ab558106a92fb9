"""MemoryLearner: learns by reading the support set into the state of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation import Adapted, Plan, Support
from modmeta.adapters import State, UnitConfig
from modmeta.data import Episode
from modmeta.errors import ModmetaError, refuse_outside
from modmeta.learners.base import MetaLearner
from modmeta.learners.measuring import episode_ids, episode_support
from modmeta.learners.memory_networks import MEMORY_NETWORKS, MemoryNetwork, Recall
from modmeta.learners.source import BackboneConfig, SourceConfig


@dataclass(frozen=True)
class Remembered:
    """A support set as a memory network holds it; called with features, it gives logits.

    Attributes:
        embed: from features ``(B, D)`` to what the network reads.
        recall: answers queries in label codes.
        codes: ``(C,)``, the label code of every class.
    """

    embed: Callable[[Tensor], Tensor]
    recall: Recall
    codes: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of features ``(B, D)``, each judged alone."""
        return self.recall(self.embed(features)[None])[0, :, self.codes]


class MemoryLearner(MetaLearner):
    """A network reads the labelled support as a sequence; what it remembers of it is all that adapts.

    ``lstm`` (Hochreiter et al., 2001) sees every image with the label of the image before it, ``mann`` (Santoro et al.,
    ICML 2016) and ``snail`` (Mishra et al., ICLR 2018) with its own. The order of the images, and which label code
    stands for which class, are drawn anew for every training episode, so that nothing but the support can tell them.
    Queries then come one by one after the same support, and know nothing of each other.

    The network reads frozen features, or those of an embedding that is trained with it: the units as the bank holds
    them, every gate open.

    Args:
        backbone: the timm model that all domains share.
        network: registered name of the memory network.
        ways: most classes per episode.
        embedding: numbers per image that the network reads, a learned linear map of the features.
        network_options: options of the network.
        readings: times that a training episode is read, every time in another order and under other label codes; a
            way to see more sequences than features are computed for.
        units: adapter modules that make the embedding; none leaves the features those of the backbone.
        source: source training; off by default.
        learning_rate: of AdamW on everything that is meta-learned.
        baselines: heads that are measured beside this learner, on unadapted features and the same episodes.
        source_images: images per class and domain that the source statistics are measured on.
        cache_dir: where frozen features are kept; None keeps them in memory.

    Raises:
        ModmetaError: if an option makes no sense.
    """

    facts: Mapping[str, tuple[str, ...]] = {"adapted": ("seconds",)}

    def __init__(
        self,
        backbone: BackboneConfig,
        network: str,
        ways: int,
        embedding: int = 32,
        network_options: dict[str, int | float] | None = None,
        readings: int = 1,
        units: Sequence[UnitConfig] = (),
        source: SourceConfig = SourceConfig(),
        learning_rate: float = 1e-3,
        baselines: Sequence[str] = (),
        source_images: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        # The head is that of the system `none`: class means of unadapted features.
        super().__init__(backbone, units, "prototype", None, source, learning_rate, baselines, source_images, cache_dir)
        if ways < 2:
            raise ModmetaError(f"ways: a memory learner needs label codes for 2 or more classes, got {ways}")
        for option, value in {"embedding": embedding, **(network_options or {})}.items():
            if value <= 0:
                raise ModmetaError(f"{option} must be above 0, got {value}")
        refuse_outside({"readings": readings}, 1)
        self.head.requires_grad_(False)
        self.ways = ways
        self.readings = readings
        self.embedding = nn.Linear(self.model.backbone.feature_dim, embedding)
        self.memory: MemoryNetwork = MEMORY_NETWORKS.make(network, embedding, ways, **(network_options or {}))

    def adapt(self, support: Support) -> Adapted:
        """Read the support, in an order that depends on the number of images alone.

        Raises:
            ModmetaError: if the images have no labels, or there are more classes than label codes.
        """
        state, plan, features = self._perceive(support)
        order, codes = self._deal(support, torch.Generator().manual_seed(0))
        recall = self.memory.read(self._embed(features[order])[None], self._shown(support, order, codes)[None])
        return Adapted(state, plan, Remembered(self._embed, recall, codes), support.classes)

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return the mean query loss of one training episode over its readings."""
        return self.episode_losses([episode])[0]

    def episode_losses(self, episodes: Sequence[Episode]) -> Tensor:
        """Return the losses ``(N,)`` of training episodes; those of one shape are read side by side."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, episode in enumerate(episodes):
            shape = len(episode.support), len(episode.query), len(episode.classes)
            alike.setdefault(shape, []).append(place)
        found = torch.cat([self._losses([episodes[place] for place in places]) for places in alike.values()])
        places = torch.tensor([place for places in alike.values() for place in places])
        return found[places.argsort().to(found.device)]

    def meta_gradient(
        self, episodes: Sequence[Episode], parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss of some episodes and its gradient, all of them in one pass.

        Raises:
            DivergedError: when a loss or gradient is not finite, naming step, episode and domain.
        """
        losses = self.episode_losses(episodes)
        gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True, materialize_grads=True)
        self._refuse_not_finite(episodes, losses, parameters, gradients)
        return losses.detach().mean(), list(gradients)

    def _losses(self, episodes: Sequence[Episode]) -> Tensor:
        supports, queries, shown, codes = [], [], [], []
        for episode in episodes:
            support_ids, query_ids = episode_ids(episode)
            support = episode_support(episode, hide=True)
            state, plan, features = self._perceive(support, support_ids)
            query = self.features(episode.query, state, plan, query_ids)
            generator = torch.Generator().manual_seed(episode.index)
            for _ in range(self.readings):
                order, own = self._deal(support, generator)
                supports.append(features[order])
                queries.append(query)
                shown.append(self._shown(support, order, own))
                codes.append(own)
        recall = self.memory.read(self._embed(torch.stack(supports)), torch.stack(shown))
        logits = recall(self._embed(torch.stack(queries)))
        labels = [episode.query_labels for episode in episodes for _ in range(self.readings)]
        losses = [self.query_loss(own[:, c], y) for own, c, y in zip(logits, codes, labels, strict=True)]
        return torch.stack(losses).unflatten(0, (len(episodes), self.readings)).mean(1)

    def _perceive(self, support: Support, ids: Tensor | None = None) -> tuple[State, Plan, Tensor]:
        """Return the features of a support, and the state and plan that they are of."""
        if support.labels is None:
            raise ModmetaError(f"{type(self).__name__} reads labelled images; sort the support into classes")
        if support.ways > self.ways:
            raise ModmetaError(
                f"the support has {support.ways} classes, and this memory learner codes for {self.ways}; "
                f"give fewer, or fit with a larger `ways`"
            )
        state, plan = self.learned(support.images)
        return state, plan, self.features(support.images, state, plan, ids)

    def _deal(self, support: Support, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return an order ``(S,)`` of the images, and a label code for every class, ``(C,)``."""
        order = torch.randperm(len(support.images), generator=generator)
        codes = torch.randperm(self.ways, generator=generator)[: support.ways]
        return order.to(support.images.device), codes.to(support.images.device)

    def _shown(self, support: Support, order: Tensor, codes: Tensor) -> Tensor:
        """Return the one-hot label codes ``(S, ways)`` in the order of the images."""
        assert support.labels is not None
        return F.one_hot(codes[support.labels[order]], self.ways).to(self.embedding.weight.dtype)

    def _embed(self, features: Tensor) -> Tensor:
        # Zero mean and unit variance per image suit one network to every backbone.
        embedded: Tensor = self.embedding(F.layer_norm(features, features.shape[-1:]))
        return embedded
