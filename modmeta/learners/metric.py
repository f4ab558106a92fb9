"""MetricLearner: trains an embedding in which a few labelled images per class are enough to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from modmeta.adaptation import COMPARISONS, PAIR_LOSSES, Adapted, Compared, Comparison, Support
from modmeta.adapters import UnitConfig
from modmeta.data import Episode
from modmeta.errors import ModmetaError
from modmeta.learners.base import MetaLearner
from modmeta.learners.measuring import episode_ids, episode_support
from modmeta.learners.source import BackboneConfig, SourceConfig


class MetricLearner(MetaLearner):
    """Prototypical, matching, siamese and relation networks, and every closed-form head on a trained embedding.

    The embedding is the backbone under its units as the bank holds them: every gate is open and there is no inner
    loop, so meta-training moves the bank's initial values. With the module ``full`` on all layers that is the whole
    network, with fewer or smaller units a part of it, and without units the features stay those of the backbone.
    A query is then compared with the support by a head or, in its place, by a comparison:

    * ``head: prototypical``: Snell et al., NeurIPS 2017; ``ridge``: Bertinetto et al., ICLR 2019; and the others.
    * ``comparison: matching``: Vinyals et al., NeurIPS 2016.
    * ``comparison: siamese`` with ``pair_loss: logistic``: Koch et al., 2015; ``nearest`` with ``contrastive``:
      Hadsell et al., CVPR 2006.
    * ``comparison: relation`` with ``pair_loss: mse``: Sung et al., CVPR 2018.

    Args:
        backbone: the timm model that all domains share.
        units: adapter modules that make the embedding.
        head: registered name of the head. With a comparison, it only serves as the system ``none``.
        head_options: options of the head.
        comparison: registered name of the comparison that classifies, if it is not the head.
        comparison_options: its options.
        pair_loss: registered loss on the comparison's pairs, in place of the query loss.
        source: source training; off by default.
        learning_rate: of AdamW on everything that is meta-learned.
        baselines: heads that are measured beside this learner, on unadapted features and the same episodes.
        source_images: images per class and domain that the source statistics are measured on.
        cache_dir: where frozen features are kept; None keeps them in memory.

    Raises:
        ModmetaError: if the parts make no sense together.
    """

    facts: Mapping[str, tuple[str, ...]] = {"adapted": ("seconds",)}

    def __init__(
        self,
        backbone: BackboneConfig,
        units: Sequence[UnitConfig] = (),
        head: str = "prototypical",
        head_options: dict[str, float] | None = None,
        comparison: str | None = None,
        comparison_options: dict[str, int | float] | None = None,
        pair_loss: str | None = None,
        source: SourceConfig = SourceConfig(),
        learning_rate: float = 1e-3,
        baselines: Sequence[str] = (),
        source_images: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            backbone, units, head, head_options, source, learning_rate, baselines, source_images, cache_dir
        )
        if self.head.anchored and units:
            raise ModmetaError(
                f"head {head!r} starts from a classifier of unadapted features, and units change them; take 'ridge'"
            )
        self.comparison: Comparison | None = None
        if comparison is not None:
            width = self.model.backbone.feature_dim
            self.comparison = COMPARISONS.make(comparison, width, **(comparison_options or {}))
            self.head.requires_grad_(False)
        elif comparison_options:
            raise ModmetaError("comparison_options are given, but no comparison; name one, or leave them out")
        self.pair_loss = None if pair_loss is None else PAIR_LOSSES.get(pair_loss)
        if self.pair_loss is not None and self.comparison is None:
            raise ModmetaError(
                f"pair_loss {pair_loss!r} needs a comparison, one of {', '.join(COMPARISONS)}; a head has no pairs"
            )
        if pair_loss == "contrastive" and self.comparison is not None and not self.comparison.distance:
            raise ModmetaError(f"pair_loss 'contrastive' needs distances, which {comparison!r} has not; take 'nearest'")
        if not self.meta_parameters():
            raise ModmetaError(f"comparison {comparison!r} has nothing to learn, and there are no units; name some")

    def adapt(self, support: Support) -> Adapted:
        """Embed the support, and fit the head or the comparison to it.

        Raises:
            ModmetaError: if the images have no labels.
        """
        return self._fit(support)

    def _fit(self, support: Support, ids: Tensor | None = None) -> Adapted:
        if support.labels is None:
            raise ModmetaError(f"{type(self).__name__} compares with labelled images; sort the support into classes")
        state, plan = self.learned(support.images)
        features = self.features(support.images, state, plan, ids)
        if self.comparison is None:
            return Adapted(state, plan, self.fit_head(features, support), support.classes)
        return Adapted(state, plan, self.comparison.fit(features, support.labels, support.ways), support.classes)

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return the query loss of one training episode, or the loss on pairs of query images and references."""
        support_ids, query_ids = episode_ids(episode)
        adapted = self._fit(episode_support(episode, hide=True), support_ids)
        features = self.features(episode.query, adapted.state, adapted.plan, query_ids)
        if self.pair_loss is None:
            return self.query_loss(adapted.classifier(features), episode.query_labels)
        assert isinstance(adapted.classifier, Compared)
        same = episode.query_labels[:, None] == adapted.classifier.labels
        return self.pair_loss(adapted.classifier.scores(features), same)
