"""Ridge regression heads: plain, or starting from the source domains' classifier, and wary of wrong labels."""

from __future__ import annotations

import torch
from torch import Tensor

from modmeta.adaptation.heads import Classifier, Head, Labelled, register_head
from modmeta.errors import refuse_outside

_LEAST_TRUST = 1e-3  # an image's own ridge strength is divided by it


@register_head("ridge")
class RidgeHead(Head):
    """Ridge regression on centred features of unit length, in the dual form.

    Bertinetto et al., "Meta-learning with differentiable closed-form solvers", ICLR 2019. Every class weighs
    the same, however many images it has. Held-out logits are exact leave-one-out in closed form.

    Told that labels may be wrong, it asks of every image how likely its label is right, judging by a head that has not
    seen the image, and weighs the image by that in the fit: one step of expectation maximisation under
    labels of which a given share was replaced by any other class. The loss of held-out logits is that of the same
    labels ("forward correction": Patrini et al., "Making Deep Neural Networks Robust to Label Noise", CVPR 2017).

    Args:
        scale: initial factor on the logits, above 0.
        ridge: initial ridge strength for features of unit length, above 0.
        label_noise: share of labels to reckon with as wrong, 0 to 0.5; at 0 every label is taken at its word.
    """

    def __init__(self, scale: float = 10.0, ridge: float = 1.0, label_noise: float = 0.0) -> None:
        super().__init__(scale, ridge)
        refuse_outside({"head_options.label_noise": label_noise}, 0, 0.5)
        self.label_noise = label_noise

    def fit_to(self, support: Labelled) -> Classifier:
        """Solve for the weights ``W0 + X^T (X X^T + lambda N)^-1 (Y - X W0)``."""
        x, center = support.centred()
        start, bias = self._start(x, support)
        residual = support.one_hot - 1.0 / support.ways - x @ start - bias
        system = self._system(x, support, self.trust(support) if self.label_noise else None)
        weight = start + x.T @ torch.linalg.solve(system, residual)
        return Classifier(weight, bias, center, self.log_scale.exp(), True)

    def held_out_of(self, support: Labelled) -> Tensor:
        """Return ``Y - e`` with ``e_i = [G R]_i / G_ii`` and ``G`` the inverse of the dual system.

        Every label is taken at its word here: a trust in the others would depend on the image that is left out.
        """
        x, _ = support.centred()
        targets = support.one_hot - 1.0 / support.ways
        start, bias = self._start(x, support)
        residual = targets - x @ start - bias
        inverse = torch.linalg.inv(self._system(x, support))
        errors = (inverse @ residual) / inverse.diagonal()[:, None]
        return self.log_scale.exp() * (targets - errors)

    def support_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(S,)`` of labels of which some may be wrong."""
        if not self.label_noise:
            return super().support_loss(logits, labels)
        right, wrong = self._likelihoods(logits, labels)
        return -(right + wrong).log()

    def doubt(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return how likely every label is wrong ``(S,)``, by Bayes' rule with the share that is reckoned with."""
        right, wrong = self._likelihoods(logits, labels)
        return wrong / (right + wrong)

    @torch.no_grad()
    def trust(self, support: Labelled) -> Tensor:
        """Return how likely every label is right ``(S,)``; no gradient follows from it."""
        right, wrong = self._likelihoods(self.held_out_of(support), support.labels)
        # With the only image of a class that no source knows, all that could vouch for it is left out.
        alone = support.one_hot.sum(0)[support.labels] == 1
        if support.anchor is not None and self.anchored:
            alone &= ~support.anchor.known[support.labels]
        return torch.where(alone, torch.ones_like(right), right / (right + wrong)).clamp_min(_LEAST_TRUST)

    def _likelihoods(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities ``(S,)`` of a label that is right, and of the same label being a wrong one."""
        own = logits.softmax(-1).gather(1, labels[:, None]).squeeze(1).clamp_min(torch.finfo(logits.dtype).tiny)
        return (1 - self.label_noise) * own, self.label_noise * (1 - own) / max(logits.shape[1] - 1, 1)

    def _start(self, x: Tensor, support: Labelled) -> tuple[Tensor, Tensor]:
        """Return weights ``(D, C)`` and a bias ``(C,)`` to start from; only the weights are corrected."""
        return x.new_zeros(x.shape[1], support.ways), x.new_zeros(support.ways)

    def _system(self, x: Tensor, support: Labelled, trust: Tensor | None = None) -> Tensor:
        strength = self.log_ridge.exp() * (1.0 if support.ridge is None else support.ridge)
        counts = support.one_hot.sum(0)
        # An image of a class with many others counts for less: its own lambda is larger.
        balance = counts[support.labels] * (counts > 0).sum() / counts.sum()
        if trust is not None:
            balance = balance / trust
        return x @ x.T + torch.diag(strength * balance)


@register_head("anchored_ridge")
class AnchoredRidgeHead(RidgeHead):
    """Ridge regression on what the source domains' own classifier leaves unexplained.

    For classes that the sources share it starts from their classifier and corrects it by the support; for new
    classes it is plain ridge. With few images this is the bar that any adaptation has to pass.
    """

    anchored = True

    def _start(self, x: Tensor, support: Labelled) -> tuple[Tensor, Tensor]:
        weight, bias = super()._start(x, support)
        return (weight, bias) if support.anchor is None else (support.anchor.weight, bias)
