"""AmortizedLearner: generates the adapter modules' parameters from the support set, without any gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation import Adapted, Support
from modmeta.adapters import State, UnitConfig
from modmeta.data import Episode
from modmeta.errors import ModmetaError
from modmeta.learners.base import MetaLearner
from modmeta.learners.measuring import episode_ids, episode_support
from modmeta.learners.source import BackboneConfig, SourceConfig


class SetEncoder(nn.Module):
    """A deep set: what a support set has in common, whatever its order and size.

    Zaheer et al., "Deep Sets", NeurIPS 2017.

    Args:
        width: number of features.
        hidden: width of the layers and of the encoding.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.each = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.whole = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        """Return the encoding ``(hidden,)`` of features ``(S, D)``."""
        encoding: Tensor = self.whole(self.each(F.layer_norm(features, (self.width,))).mean(0))
        return encoding


class Generator(nn.Module):
    """A linear map per unit from the encoding to every tensor that the unit learns; zero when untrained.

    Args:
        hidden: width of the encoding.
        shapes: by unit the shapes of its tensors by name.
    """

    def __init__(self, hidden: int, shapes: Sequence[dict[str, torch.Size]]) -> None:
        super().__init__()
        self.shapes = shapes
        self.maps = nn.ModuleList(nn.Linear(hidden, sum(s.numel() for s in own.values())) for own in shapes)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, encoding: Tensor) -> State:
        """Return the generated changes by name."""
        changes: State = {}
        for own, linear in zip(self.shapes, self.maps, strict=True):
            parts = linear(encoding).split([shape.numel() for shape in own.values()])
            changes |= {name: part.view(shape) for part, (name, shape) in zip(parts, own.items(), strict=True)}
        return changes


class AmortizedLearner(MetaLearner):
    """Generates the units' parameters from an encoding of the support: one forward pass adapts.

    With units of the module ``film`` these are CNAPs: Requeima et al., "Fast and Flexible Multi-Task Classification
    Using Conditional Neural Adaptive Processes", NeurIPS 2019; with the head ``mahalanobis`` too, Simple CNAPs: Bateni
    et al., "Improved Few-Shot Visual Classification", CVPR 2020. The set encoder reads the frozen backbone's features,
    where the papers train a second convolutional network. Any units will do; each has a generator of all that it
    learns, on top of the bank's initial values. Untrained, it is the head on unadapted features.

    Args:
        backbone: the timm model that all domains share.
        units: adapter modules whose parameters are generated.
        head: registered name of the head.
        head_options: options of the head.
        source: source training; off by default.
        learning_rate: of AdamW on everything that is meta-learned.
        baselines: heads that are measured beside this learner, on unadapted features and the same episodes.
        source_images: images per class and domain that the source statistics are measured on.
        cache_dir: where frozen features are kept; None keeps them in memory.
        hidden: width of the set encoder and of its encoding.

    Raises:
        ModmetaError: if there is nothing to generate, or an option makes no sense.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        units: Sequence[UnitConfig],
        head: str = "mahalanobis",
        head_options: dict[str, float] | None = None,
        source: SourceConfig = SourceConfig(),
        learning_rate: float = 1e-3,
        baselines: Sequence[str] = (),
        source_images: int = 100,
        cache_dir: str | None = None,
        hidden: int = 64,
    ) -> None:
        super().__init__(
            backbone, units, head, head_options, source, learning_rate, baselines, source_images, cache_dir
        )
        learning = [unit for unit in self.model.units if unit.learns]
        if not learning:
            raise ModmetaError(
                "units: the amortised learner generates what units learn, and there is none that learns; add film"
            )
        if hidden < 1:
            raise ModmetaError(f"hidden must be 1 or more, got {hidden}")
        fresh = self.model.fresh()
        shapes = [{name: fresh[name].shape for name in self.model.learned_names(unit)} for unit in learning]
        self.encoder = SetEncoder(self.model.backbone.feature_dim, hidden)
        self.generator = Generator(hidden, shapes)

    def adapt(self, support: Support) -> Adapted:
        """Generate the units' parameters from the support, and fit the head to the features under them."""
        return self._generate(support)

    def _generate(self, support: Support, ids: Tensor | None = None) -> Adapted:
        changes = self.generator(self.encoder(self.prior_features(support.images, ids)))
        initial = self.bank.initial()
        state, plan = self.learned(support.images, initial | {n: initial[n] + c for n, c in changes.items()})
        features = self.features(support.images, state, plan, ids)
        return Adapted(state, plan, self.fit_head(features, support), support.classes)

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return the query loss of one training episode."""
        support_ids, query_ids = episode_ids(episode)
        adapted = self._generate(episode_support(episode, hide=True), support_ids)
        return self.query_loss(self.logits(adapted, episode.query, query_ids), episode.query_labels)
