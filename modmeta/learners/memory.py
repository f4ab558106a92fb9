"""MemoryLearner: learns by reading the support set into the state of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation import Adapted, Support
from modmeta.adapters import UnitConfig
from modmeta.data import Episode
from modmeta.errors import ModmetaError
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
        return self.recall(self.embed(features))[:, self.codes]


class MemoryLearner(MetaLearner):
    """A network reads the labelled support as a sequence; what it remembers of it is all that adapts.

    ``lstm`` (Hochreiter et al., 2001) and ``mann`` (Santoro et al., ICML 2016) see every image with the label of the
    image before it, ``snail`` (Mishra et al., ICLR 2018) with its own. The order of the images, and which label code
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
        units: Sequence[UnitConfig] = (),
        source: SourceConfig = SourceConfig(),
        learning_rate: float = 1e-3,
        baselines: Sequence[str] = (),
        source_images: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        # The head is that of the system `none`: class means of unadapted features.
        super().__init__(
            backbone, units, "prototype", None, source, learning_rate, baselines, source_images, cache_dir
        )
        if ways < 2:
            raise ModmetaError(f"ways: a memory learner needs label codes for 2 or more classes, got {ways}")
        for option, value in {"embedding": embedding, **(network_options or {})}.items():
            if value <= 0:
                raise ModmetaError(f"{option} must be above 0, got {value}")
        self.head.requires_grad_(False)
        self.ways = ways
        self.embedding = nn.Linear(self.model.backbone.feature_dim, embedding)
        self.memory: MemoryNetwork = MEMORY_NETWORKS.make(network, embedding, ways, **(network_options or {}))

    def adapt(self, support: Support) -> Adapted:
        """Read the support, in an order that depends on the number of images alone.

        Raises:
            ModmetaError: if the images have no labels, or there are more classes than label codes.
        """
        return self._read(support, seed=0)

    def _read(self, support: Support, seed: int, ids: Tensor | None = None) -> Adapted:
        if support.labels is None:
            raise ModmetaError(f"{type(self).__name__} reads labelled images; sort the support into classes")
        if support.ways > self.ways:
            raise ModmetaError(
                f"the support has {support.ways} classes, and this memory learner codes for {self.ways}; "
                f"give fewer, or fit with a larger `ways`"
            )
        state, plan = self.learned(support.images)
        features = self.features(support.images, state, plan, ids)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(features), generator=generator).to(features.device)
        codes = torch.randperm(self.ways, generator=generator)[: support.ways].to(features.device)
        one_hot = F.one_hot(codes[support.labels[order]], self.ways).to(features.dtype)
        recall = self.memory.read(self._embed(features[order]), one_hot)
        return Adapted(state, plan, Remembered(self._embed, recall, codes), support.classes)

    def _embed(self, features: Tensor) -> Tensor:
        # Zero mean and unit variance per image suit one network to every backbone.
        embedded: Tensor = self.embedding(F.layer_norm(features, features.shape[-1:]))
        return embedded

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return the query loss of one training episode, shown in an order of its own."""
        support_ids, query_ids = episode_ids(episode)
        adapted = self._read(episode_support(episode, hide=True), episode.index, support_ids)
        return self.query_loss(self.logits(adapted, episode.query, query_ids), episode.query_labels)
