"""Which features go with which class attributes: a closed form, measured on the source domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation.bilinear import fit_forms
from modmeta.adaptation.heads import Anchor
from modmeta.errors import ModmetaError

_MOST_FOLDS = 4


class Compatibility(nn.Module):
    """A bilinear form ``x V s`` of features and class attributes, measured once before meta-training.

    A class with attributes ``s`` gets the weights ``V s``, whether the sources have images of it or not. Romera-Paredes
    and Torr, "An embarrassingly simple approach to zero-shot learning", ICML 2015. Classes that the form was fitted to
    score higher than others, so a penalty is taken off their scores: Chao et al., "An Empirical Study and Analysis of
    Generalized Zero-Shot Learning for Object Recognition in the Wild", ECCV 2016.

    Ridge strengths and penalty are those of the largest harmonic mean of the accuracies on seen and unseen classes,
    in domains and on folds of the classes that the form was fitted without. The forms without a domain and a fold
    are kept: with one of them a training episode is what a test on new classes is.
    """

    plain: Tensor
    aligned: Tensor
    mean: Tensor
    middle: Tensor
    spread: Tensor
    penalties: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.domains: tuple[str, ...] = ()
        self.classes: tuple[str, ...] = ()

    @property
    def folds(self) -> int:
        """Number of folds of the source classes."""
        return min(_MOST_FOLDS, len(self.classes))

    @torch.no_grad()
    def measure(self, domains: Mapping[str, tuple[Tensor, Tensor]], classes: Sequence[str], attributes: Tensor) -> None:
        """Fit the form to the source domains.

        Args:
            domains: features ``(n, D)`` and labels ``(n,)`` of each; the labels index ``classes``.
            classes: names of the source classes.
            attributes: ``(C, A)``, theirs.

        Raises:
            ModmetaError: if there are too few classes to hold some out, or no attribute tells them apart.
        """
        if len(classes) < 3:
            raise ModmetaError(f"zero-shot learning needs 3 training classes or more, and there are {len(classes)}")
        self.domains, self.classes = tuple(domains), tuple(classes)
        xs, ys = [x for x, _ in domains.values()], [y for _, y in domains.values()]
        attributes = attributes.to(xs[0])
        self._keep(
            mean=torch.stack([x.mean(0) for x in xs]),
            middle=attributes.mean(0),
            spread=attributes.std(0, correction=0),
        )
        if not bool((self.spread > 0).any()):
            raise ModmetaError("the attributes are the same for all training classes; add some that tell them apart")
        s = self.directions(attributes)
        aligned = fit_forms([F.normalize(x - x.mean(0), dim=-1) for x in xs], ys, s, self.folds)
        plain = fit_forms([F.normalize(x - self.mean.mean(0), dim=-1) for x in xs], ys, s, self.folds)
        self._keep(
            aligned=aligned.forms,
            plain=plain.forms,
            penalties=torch.stack([aligned.penalty, plain.penalty]),
            scale=plain.scale,
        )

    def directions(self, attributes: Tensor) -> Tensor:
        """Return attributes ``(C, A)`` in units of their spread over the source classes, each vector of length one.

        An attribute that is the same for all source classes says nothing about images, and becomes 0.
        """
        spread = torch.where(self.spread > 0, self.spread, torch.inf)
        return F.normalize((attributes.to(self.middle) - self.middle) / spread, dim=-1)

    def anchor(
        self,
        classes: Sequence[str],
        attributes: Tensor,
        without: str | None = None,
        fold: int | None = None,
        aligned: bool = True,
    ) -> Anchor:
        """Return the classifier that attributes give.

        Args:
            classes: names of the classes to tell apart.
            attributes: ``(C, A)``, theirs.
            without: a source domain to leave out, as far as there are others.
            fold: a fold of the source classes to leave out.
            aligned: whether features will be centred on their own domain's mean; otherwise on that of the sources.
        """
        hidden = without in self.domains and len(self.domains) > 1
        row = 1 + self.domains.index(str(without)) if hidden else 0
        forms = self.aligned if aligned else self.plain
        weight = forms[row, 0 if fold is None else 1 + fold] @ self.directions(attributes).T
        index = {name: number for number, name in enumerate(self.classes)}
        seen = [name in index and (fold is None or index[name] % self.folds != fold) for name in classes]
        penalty = self.penalties[0 if aligned else 1]
        return Anchor(
            weight=weight,
            known=torch.ones(len(classes), dtype=torch.bool, device=weight.device),
            center=self.mean[[k for k, name in enumerate(self.domains) if not hidden or name != without]].mean(0),
            offset=-penalty * torch.tensor(seen, device=weight.device).to(weight),
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Return names and tensors; their shapes depend on the sources and the attributes."""
        tensors = {name: getattr(self, name) for name in self._buffers}
        return {"domains": list(self.domains), "classes": list(self.classes), "tensors": tensors}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take names and tensors from a ``state_dict``."""
        self.domains, self.classes = tuple(state["domains"]), tuple(state["classes"])
        self._keep(**state["tensors"])

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach(), persistent=False)
