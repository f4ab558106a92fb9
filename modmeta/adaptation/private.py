"""Differentially private descent: a clipped gradient per image, Gaussian noise, and an accountant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modmeta.errors import ModmetaError

Loss = Callable[[Mapping[str, Tensor], int], Tensor]
"""From the tensors that learn and the number of an image to the loss of that image alone, a scalar."""

_ORDERS = [1 + 2 ** (k / 8) for k in range(-64, 113)]
"""Of Renyi divergences; any choice gives a valid promise, and a wide one a tight one."""


@dataclass(frozen=True)
class Privacy:
    """What a private adaptation promises, and how its gradients are clipped.

    The promise is (epsilon, delta)-differential privacy of the adapted tensors: replacing one image of the support,
    whatever by, changes the probability of any outcome by a factor of at most ``exp(epsilon)``, up to ``delta``.
    Dwork et al., "Calibrating Noise to Sensitivity in Private Data Analysis", TCC 2006; Abadi et al., "Deep Learning
    with Differential Privacy", CCS 2016.

    Attributes:
        epsilon: above 0; infinity adds no noise, which shows what clipping alone costs, and promises nothing.
        delta: in 0..1, well below one over the number of images.
        clip: largest norm of what one image contributes to a step, above 0.

    Raises:
        ModmetaError: if one of them is out of its range.
    """

    epsilon: float
    delta: float = 1e-5
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ModmetaError(f"epsilon must be above 0, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ModmetaError(f"delta must lie between 0 and 1, got {self.delta}")
        if not 0 < self.clip < math.inf:
            raise ModmetaError(f"clip must be above 0, got {self.clip}")

    @property
    def sensitivity(self) -> float:
        """How far one image, replaced by another, can move the sum of the clipped gradients."""
        return 2 * self.clip

    def noise_multiplier(self, steps: int) -> float:
        """Return the noise's standard deviation, in units of the sensitivity, that keeps ``steps`` steps private.

        Every step sees the whole support, so nothing is gained from sampling.

        Raises:
            ModmetaError: if Opacus is not installed, or no noise that it knows of is enough.
        """
        if not steps or math.isinf(self.epsilon):
            return 0.0
        accountants = _accountants()
        try:
            return float(
                accountants.utils.get_noise_multiplier(
                    target_epsilon=self.epsilon,
                    target_delta=self.delta,
                    sample_rate=1.0,
                    steps=steps,
                    accountant="rdp",
                    epsilon_tolerance=1e-3 * self.epsilon,
                    alphas=_ORDERS,
                )
            )
        except ValueError as error:
            raise ModmetaError(f"epsilon {self.epsilon} cannot be had at delta {self.delta} ({error})") from error

    def spent(self, noise_multiplier: float, steps: int) -> float:
        """Return the epsilon that ``steps`` steps with this noise amount to at ``delta``; infinity without noise."""
        if not steps:
            return 0.0
        if not noise_multiplier:
            return math.inf
        accountant = _accountants().RDPAccountant()
        accountant.history = [(noise_multiplier, 1.0, steps)]
        return float(accountant.get_epsilon(self.delta, alphas=_ORDERS))

    def to_dict(self, steps: int) -> dict[str, float | int]:
        """Return the promise, and what keeps it over ``steps`` steps, as plain data."""
        noise = self.noise_multiplier(steps)
        return asdict(self) | {
            "steps": steps,
            "noise_multiplier": noise,
            "noise_deviation": noise * self.sensitivity,
            "epsilon_spent": self.spent(noise, steps),
        }


def signal_share(privacy: Privacy, steps: int, images: int, numbers: int) -> float:
    """Return the share of signal in the squared norm of a noisy sum, were all contributions alike and of full length.

    Args:
        privacy: the promise.
        steps: over how many steps it holds.
        images: how many contribute.
        numbers: how many numbers learn.
    """
    noise = privacy.noise_multiplier(steps) * privacy.sensitivity
    signal = images * privacy.clip
    return signal**2 / (signal**2 + numbers * noise**2)


def private_descent(
    initial: Mapping[str, Tensor],
    rates: Sequence[Mapping[str, float]],
    loss: Loss,
    images: int,
    privacy: Privacy,
    random: np.random.Generator,
) -> dict[str, Tensor]:
    """Descend a loss by noisy sums of clipped gradients.

    A tensor learns in units of its rate, as a share of the largest rate. A step's size is set by numbers that do not
    depend on the images: were all contributions alike and as long as the bound, and were there no noise, it would move
    the numbers of a tensor of the largest rate by that rate, root mean square. It is shortened by the share of the
    squared norm that would be signal then, so that noise that drowns the images moves nothing far.

    Args:
        initial: where the tensors start.
        rates: for every step the rate of each tensor, above 0.
        loss: must not look at any other image.
        images: their number ``S``.
        privacy: the promise.
        random: the noise's source, which must stay secret: who knows it can subtract the noise.

    Returns:
        the tensors after the steps.
    """
    noise = privacy.noise_multiplier(len(rates)) * privacy.sensitivity
    tensors = {name: tensor.detach().clone() for name, tensor in initial.items()}
    count = sum(tensor.numel() for tensor in tensors.values())
    signal = images * privacy.clip
    share = signal_share(privacy, len(rates), images, count)
    for rate in rates:
        top = max(rate.values())
        scale = {name: rate[name] / top for name in tensors}
        total = clipped_sum(tensors, scale, loss, images, privacy.clip)
        noisy = total + noise * torch.from_numpy(random.standard_normal(count)).to(total)
        step = top * share * math.sqrt(count) / signal * noisy
        parts = step.split([tensor.numel() for tensor in tensors.values()])
        for (name, tensor), part in zip(tensors.items(), parts, strict=True):
            tensors[name] = tensor - scale[name] * part.view_as(tensor).to(tensor)
    return tensors


def clipped_sum(
    tensors: Mapping[str, Tensor], scale: Mapping[str, float], loss: Loss, images: int, clip: float
) -> Tensor:
    """Return the sum ``(P,)``, float64, of every image's own gradient in units of the scales, shortened to ``clip``.

    A gradient that is not finite counts as zero, without a word: a message would tell of the image.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    total = torch.zeros(sum(t.numel() for t in leaves.values()), dtype=torch.double)
    for index in range(images):
        with torch.enable_grad():
            found = torch.autograd.grad(loss(leaves, index), list(leaves.values()), allow_unused=True)
        parts = zip(leaves.items(), found, strict=True)
        gradients = [(name, torch.zeros_like(leaf) if g is None else g) for (name, leaf), g in parts]
        gradient = torch.cat([scale[name] * g.double().cpu().flatten() for name, g in gradients])
        norm = gradient.norm()
        if torch.isfinite(norm):
            total += gradient * (clip / norm.clamp_min(clip))
    return total


def secret_random() -> np.random.Generator:
    """Return a source of noise with 256 bits from the operating system, which nobody can try out.

    Torch's own generator keeps 32 bits of its seed on the CPU.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence()))


def _accountants() -> Any:
    try:
        import opacus.accountants
        import opacus.accountants.utils
    except ImportError as error:
        raise ModmetaError("private adaptation needs Opacus: pip install modmeta[private]") from error
    return opacus.accountants
