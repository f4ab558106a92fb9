"""What is remembered of the source domains: feature statistics, norm statistics and their own classifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation.heads import Anchor, Classifier
from modmeta.backbone import Backbone, Site, channel_moments
from modmeta.errors import ModmetaError

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
_SCALES = (2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class SourceView:
    """The sources as one episode may see them: without its own domain.

    Attributes:
        domains: names of the domains that are visible.
        mean: ``(K, D)`` mean feature of each.
        variance: ``(D,)`` variance within domains, pooled.
        typical: mean distance between two source domains, the yardstick for "unknown".
        norm_mean: ``(K, N)`` mean input of every channel of every norm site.
        norm_variance: ``(K, N)``.
    """

    domains: tuple[str, ...]
    classes: tuple[str, ...]
    mean: Tensor
    variance: Tensor
    typical: Tensor
    norm_mean: Tensor
    norm_variance: Tensor
    aligned: Tensor
    plain: Tensor
    scale: Tensor

    def anchor(self, classes: Sequence[str]) -> Anchor:
        """Return the sources' classifier, centred per domain, for the classes of an episode."""
        weight, known = _columns(self.aligned, self.classes, classes)
        return Anchor(weight, known, self.mean.mean(0))

    def classifier(self, classes: Sequence[str]) -> Classifier:
        """Return the sources' classifier as it is, without any knowledge of the new domain."""
        weight, known = _columns(self.plain, self.classes, classes)
        return Anchor(weight, known, self.mean.mean(0)).classifier(self.scale)

    def distances(self, mean: Tensor, count: int, to: Tensor | None = None) -> Tensor:
        """Return squared distances ``(K,)`` to domains in units of the variance within, sampling noise removed.

        Args:
            mean: ``(D,)`` mean feature of a support.
            count: number of its images.
            to: ``(K, D)`` mean features of domains; the visible sources' by default.
        """
        means = self.mean if to is None else to
        return ((mean - means).square() / self.variance).mean(1).sub(1.0 / count).clamp_min(0.0)

    def posterior(self, mean: Tensor, count: int, label: str | None = None) -> Tensor:
        """Return ``(K + 1,)`` probabilities of the domains; the last is "none of them".

        Args:
            mean: ``(D,)`` mean feature of the support.
            count: number of support images.
            label: an explicit domain label; one that names a source takes nearly all of the mass.
        """
        logits = -4.0 * torch.cat([self.distances(mean, count), self.typical[None]]) / self.typical
        posterior = logits.softmax(0)
        if label in self.domains:
            given = F.one_hot(torch.tensor(self.domains.index(label)), len(posterior)).to(posterior)
            posterior = 0.95 * given + 0.05 * posterior
        return posterior


class SourceStatistics(nn.Module):
    """Statistics of the source domains under the frozen backbone, measured once before meta-training."""

    def __init__(self) -> None:
        super().__init__()
        self.domains: tuple[str, ...] = ()
        self.classes: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the sources have been measured."""
        return bool(self.domains)

    @torch.no_grad()
    def measure(
        self, backbone: Backbone, batches: Iterable[tuple[str, Tensor, Tensor]], classes: Sequence[str]
    ) -> None:
        """Run the sources' images through the backbone and keep what adaptation needs of them.

        Args:
            backbone: the frozen backbone.
            batches: ``(domain, images (B, 3, H, W), labels (B,))``, the labels indexing ``classes``.
            classes: names of the source classes.

        Raises:
            ModmetaError: if a feature is not finite.
        """
        sites = norm_sites(backbone)
        features: dict[str, list[Tensor]] = {}
        labels: dict[str, list[Tensor]] = {}
        moments: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        for domain, images, target in batches:
            x, mean, variance = observe_norms(backbone, images, sites)
            if not torch.isfinite(x).all():
                raise ModmetaError(
                    f"the backbone {backbone.name} gives features that are not finite on domain {domain!r}"
                )
            features.setdefault(domain, []).append(x)
            labels.setdefault(domain, []).append(target.to(x.device))
            moments.setdefault(domain, []).append((len(x), mean, variance))
        self.domains, self.classes = tuple(features), tuple(classes)
        scaled = backbone.calibrate(torch.cat([chunk for chunks in features.values() for chunk in chunks]))
        counts = [sum(map(len, chunks)) for chunks in features.values()]
        xs = dict(zip(features, scaled.split(counts), strict=True))
        ys = {domain: torch.cat(chunks) for domain, chunks in labels.items()}
        self._keep(
            mean=torch.stack([x.mean(0) for x in xs.values()]),
            variance=torch.stack([x.var(0, correction=0) for x in xs.values()]),
            **_pool_moments(list(moments.values())),
            **_classifiers(list(xs.values()), list(ys.values()), len(classes)),
        )

    def view(self, without: str | None = None) -> SourceView:
        """Return the sources as an episode of the domain ``without`` may see them."""
        keep = [k for k, domain in enumerate(self.domains) if domain != without]
        classes = self.classes
        if not keep:
            # A single source: its statistics must stay, as a yardstick, but nobody may know its classes.
            keep, classes = list(range(len(self.domains))), ()
        # The classifiers are kept for "all domains" at 0 and "all but k" at k + 1.
        row = 0 if len(keep) == len(self.domains) else 1 + self.domains.index(str(without))
        mean, variance = self.mean[keep], self.variance[keep].mean(0).clamp_min(1e-8)
        gaps = ((mean[:, None] - mean[None]).square() / variance).mean(-1)
        pairs = len(keep) * (len(keep) - 1)
        typical = gaps.sum() / pairs if pairs else gaps.new_ones(())
        return SourceView(
            domains=tuple(self.domains[k] for k in keep),
            classes=classes,
            mean=mean,
            variance=variance,
            typical=typical.clamp_min(1e-6),
            norm_mean=self.norm_mean[keep],
            norm_variance=self.norm_variance[keep],
            aligned=self.aligned[row],
            plain=self.plain[row],
            scale=self.scale,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Return names and tensors; how many there are depends on the sources."""
        tensors = {name: getattr(self, name) for name in self._buffers}
        return {"domains": list(self.domains), "classes": list(self.classes), "tensors": tensors}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take names and tensors from a ``state_dict``."""
        self.domains, self.classes = tuple(state["domains"]), tuple(state["classes"])
        self._keep(**state["tensors"])

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            # In the extra state, not in the state dict: shapes are only known once the sources are.
            self.register_buffer(name, tensor.detach(), persistent=False)

    mean: Tensor
    variance: Tensor
    norm_mean: Tensor
    norm_variance: Tensor
    aligned: Tensor
    plain: Tensor
    scale: Tensor


def norm_sites(backbone: Backbone) -> list[Site]:
    """Return the norm sites, whose input statistics describe a domain."""
    return [site for site in backbone.sites if site.kind == "norm"]


@torch.no_grad()
def observe_norms(backbone: Backbone, images: Tensor, sites: Sequence[Site]) -> tuple[Tensor, Tensor, Tensor]:
    """Return features ``(B, D)`` and per channel of every norm site the input's mean and variance ``(N,)``."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def read(site: Site, x: Tensor) -> None:
        seen[site.name] = channel_moments(x.detach(), site.channel_dim)

    features = backbone.run(images, observers={site.name: partial(read, site) for site in sites})
    empty = features.new_zeros(0)
    mean = torch.cat([empty, *(seen[site.name][0] for site in sites)])
    variance = torch.cat([empty, *(seen[site.name][1] for site in sites)])
    return features, mean, variance


def running_statistics(backbone: Backbone, sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
    """Return per channel of every norm site the mean and variance that a batch norm keeps, NaN at other norms."""
    tensors, like = backbone.tensors(), next(backbone.parameters())
    found = []
    for name in ("running_mean", "running_var"):
        own = []
        for site in sites:
            channels = site.shapes["weight"][0] if "weight" in site.shapes else site.channels
            none = like.new_full((channels,), torch.nan)
            own.append(tensors.get(f"{site.name}.{name}", none))
        found.append(torch.cat([like.new_zeros(0), *own]))
    return found[0], found[1]


def _columns(weight: Tensor, known: Sequence[str], wanted: Sequence[str]) -> tuple[Tensor, Tensor]:
    index = {name: column for column, name in enumerate(known)}
    columns = [weight[:, index[name]] if name in index else weight.new_zeros(len(weight)) for name in wanted]
    mask = torch.tensor([name in index for name in wanted], device=weight.device)
    return torch.stack(columns, dim=1), mask


def _pool_moments(domains: list[list[tuple[int, Tensor, Tensor]]]) -> dict[str, Tensor]:
    means, variances = [], []
    for chunks in domains:
        total = sum(count for count, _, _ in chunks)
        mean = torch.stack([count * m for count, m, _ in chunks]).sum(0) / total
        square = torch.stack([count * (v + m.square()) for count, m, v in chunks]).sum(0) / total
        means.append(mean)
        variances.append((square - mean.square()).clamp_min(0.0))
    return {"norm_mean": torch.stack(means), "norm_variance": torch.stack(variances)}


def _classifiers(xs: list[Tensor], ys: list[Tensor], classes: int) -> dict[str, Tensor]:
    """Fit ridge classifiers on all domains and on all but each one; strength and scale by leaving domains out."""
    targets = [F.one_hot(y, classes).to(x.dtype) - 1.0 / classes for x, y in zip(xs, ys, strict=True)]
    aligned = [F.normalize(x - x.mean(0), dim=-1) for x in xs]
    center = torch.stack([x.mean(0) for x in xs]).mean(0)
    plain = [F.normalize(x - center, dim=-1) for x in xs]
    ridge = _best_ridge(aligned, ys, targets)
    with_all = [_ridge(side, targets, ridge, None) for side in (aligned, plain)]
    without = [[_ridge(side, targets, ridge, k) for k in range(len(xs))] for side in (aligned, plain)]
    losses = [
        sum(F.cross_entropy(scale * plain[k] @ without[1][k], ys[k]) for k in range(len(xs))) for scale in _SCALES
    ]
    scale = _SCALES[int(torch.stack([torch.as_tensor(loss) for loss in losses]).argmin())]
    return {
        "aligned": torch.stack([with_all[0], *without[0]]),
        "plain": torch.stack([with_all[1], *without[1]]),
        "scale": center.new_tensor(scale),
    }


def _best_ridge(xs: list[Tensor], ys: list[Tensor], targets: list[Tensor]) -> float:
    def accuracy(ridge: float) -> float:
        hits = [((x @ _ridge(xs, targets, ridge, k)).argmax(1) == ys[k]).float().mean() for k, x in enumerate(xs)]
        return float(torch.stack(hits).mean())

    return max(_RIDGES, key=accuracy)


def _ridge(xs: list[Tensor], targets: list[Tensor], ridge: float, without: int | None) -> Tensor:
    used = [k for k in range(len(xs)) if k != without] or [0]
    # Domains weigh the same, however many images each has.
    gram = torch.stack([xs[k].T @ xs[k] / len(xs[k]) for k in used]).mean(0)
    cross = torch.stack([xs[k].T @ targets[k] / len(xs[k]) for k in used]).mean(0)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * eye, cross)
