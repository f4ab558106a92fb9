"""The track record: what plans have really gained on domains that their policy was not told of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

CANDIDATES = ("statistics", "plan/3", "plan")
_FEATURES = 3  # forecast, evidence, logarithm of the shots
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, math.inf)
_SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Trial:
    """One episode on which every candidate was carried out.

    Attributes:
        domain: the episode's domain, which was hidden from all that is known of the sources.
        anchored: whether the head knew all classes without any image of them.
        shots: support images per class.
        forecast: the policy's predicted gain.
        evidence: mean gain on the support per candidate, as the veto sees it; without those it could not measure.
        gains: mean gain on the query per candidate, in nats.
    """

    domain: str
    anchored: bool
    shots: float
    forecast: float
    evidence: Mapping[str, float]
    gains: Mapping[str, float]

    @property
    def finite(self) -> bool:
        """Whether every number is one."""
        return all(map(math.isfinite, [self.forecast, *self.evidence.values(), *self.gains.values()]))


class Expectation(NamedTuple):
    """What a record says of a candidate, in nats.

    Attributes:
        gain: the expected gain over the prior.
        error: the error that such predictions had on new domains.
        lead_error: standard error of the candidate's lead over the plan.
    """

    gain: float
    error: float = 0.0
    lead_error: float = 0.0


class TrackRecord(nn.Module):
    """Predicts a plan's gain from the policy's forecast and the support's evidence, as far as these held so far.

    A policy is sure of itself where it was trained and wrong where it was not, and a few dozen support images measure
    a gain with an error that is as large as the gain. So both go through a ridge regression per candidate on trials of
    the training domains, each hidden in turn. Its strength is the one that predicts best on a domain that it was not
    fitted to; where neither forecast nor evidence carries over to new domains, what remains is the mean.

    The policy's whole plan stands unless another candidate is expected to gain more, by more than two standard errors
    of their difference, over trials or over domains, whichever is larger: over a few dozen trials, less is chance. The
    further a support is from the trials' mean, the less sure a line through them is, and the larger that error.
    A plan that is not accepted gives way to the best that is.

    What plans gained with classes that the head knew from the sources says nothing of new classes, nor the other way
    round; the record :meth:`covers` what it has trials of.

    The acceptance threshold is the smallest at which no domain would have lost, by more than the standard error of its
    trials: predictions, too, are by a fit that did not see the domain.
    """

    center: Tensor
    scale: Tensor
    weights: Tensor
    means: Tensor
    errors: Tensor
    lead_errors: Tensor
    threshold: Tensor
    trials: Tensor
    kinds: Tensor

    def __init__(self) -> None:
        super().__init__()
        count = len(CANDIDATES)
        self.register_buffer("center", torch.zeros(_FEATURES, dtype=torch.double))
        self.register_buffer("scale", torch.ones(_FEATURES, dtype=torch.double))
        self.register_buffer("weights", torch.zeros(count, _FEATURES, dtype=torch.double))
        self.register_buffer("means", torch.zeros(count, dtype=torch.double))
        self.register_buffer("errors", torch.zeros(count, dtype=torch.double))
        self.register_buffer("lead_errors", torch.zeros(count, dtype=torch.double))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.double))
        self.register_buffer("trials", torch.zeros(count, dtype=torch.long))
        self.register_buffer("kinds", torch.zeros(2, dtype=torch.long))

    @property
    def ready(self) -> bool:
        """Whether there is a record to go by."""
        return bool(self.trials.any())

    def covers(self, anchored: bool) -> bool:
        """Return whether there were trials whose head knew all classes beforehand, or of which it did not."""
        return bool(self.kinds[int(anchored)])

    def predict(self, candidate: str, forecast: float, evidence: float | None, shots: float) -> Expectation:
        """Return what is to be expected of a candidate; of one that was never tried, the worst.

        Args:
            candidate: one of ``CANDIDATES``.
            forecast: the policy's predicted gain.
            evidence: mean gain on the support; None where it could not be measured.
            shots: support images per class.
        """
        row = CANDIDATES.index(candidate)
        if not self.trials[row]:
            return Expectation(-math.inf)
        x = self._standardised(forecast, evidence, shots)
        return self._expectation(row, float(self.means[row] + self.weights[row] @ x), x)

    def choose(self, expected: Mapping[str, Expectation]) -> str | None:
        """Return the candidate to carry out, or None where none is expected to gain enough.

        Args:
            expected: what :meth:`predict` says of each candidate; what is not finite is never chosen.
        """
        return self._best(expected, float(self.threshold))

    @staticmethod
    def _best(expected: Mapping[str, Expectation], threshold: float) -> str | None:
        accepted = {name: e for name, e in expected.items() if math.isfinite(e.gain) and e.gain > threshold}
        best = max(accepted, key=lambda name: accepted[name].gain, default=None)
        if best is None or "plan" not in accepted:
            return best
        ahead = accepted[best].gain - accepted["plan"].gain
        return best if ahead > _SURE * accepted[best].lead_error else "plan"

    def _expectation(self, row: int, gain: float, x: Tensor) -> Expectation:
        # A fitted line's error at x, with inputs as uncorrelated as standardised ones may be taken to be.
        reach = float((1 + x.square().sum()).sqrt())
        return Expectation(gain, float(self.errors[row]), reach * float(self.lead_errors[row]))

    @torch.no_grad()
    def fit(self, trials: Sequence[Trial]) -> None:
        """Learn from trials; those of several domains say how far a prediction carries.

        Args:
            trials: some; from none, nothing is learned.
        """
        self.trials.zero_()
        self.kinds.copy_(torch.bincount(torch.tensor([int(t.anchored) for t in trials], dtype=torch.long), minlength=2))
        if not trials:
            return
        numbers = (
            [t.forecast for t in trials],
            [value for t in trials for value in t.evidence.values()],
            [math.log(t.shots) for t in trials],
        )
        for column, values in enumerate(map(self.center.new_tensor, numbers)):
            spread = float(values.std(correction=0)) if len(values) else 0.0
            self.center[column] = values.mean() if len(values) else 0.0
            self.scale[column] = spread if spread > 1e-6 else 1.0
        held_out = self.center.new_full((len(trials), len(CANDIDATES)), -math.inf)
        for row, name in enumerate(CANDIDATES):
            own = [index for index, trial in enumerate(trials) if name in trial.gains]
            self.trials[row] = len(own)
            if own:
                chosen = [trials[index] for index in own]
                held_out[own, row] = self._fit_candidate(row, name, chosen)
        gains = held_out.new_tensor([[trial.gains.get(name, math.nan) for name in CANDIDATES] for trial in trials])
        self.lead_errors.copy_(_lead_errors(held_out - gains, [trial.domain for trial in trials]))
        expected = [
            {n: self._expectation(row, own[row], self._seen(trial, n)) for row, n in enumerate(CANDIDATES)}
            for trial, own in zip(trials, held_out.tolist(), strict=True)
        ]
        self.threshold.fill_(self._smallest_threshold(trials, expected))

    def _standardised(self, forecast: float, evidence: float | None, shots: float) -> Tensor:
        x = self.center.new_tensor([forecast, evidence or 0.0, math.log(shots)])
        x = ((x - self.center) / self.scale).clamp(-3.0, 3.0)
        if evidence is None:
            x[1] = 0.0  # as if it were what is always seen
        return x

    def _seen(self, trial: Trial, candidate: str) -> Tensor:
        return self._standardised(trial.forecast, trial.evidence.get(candidate), trial.shots)

    def _smallest_threshold(self, trials: Sequence[Trial], expected: Sequence[Mapping[str, Expectation]]) -> float:
        """Return the smallest threshold, from 0 up, at which no domain loses more than its standard error."""
        domains = _rows_by_domain([trial.domain for trial in trials])
        values = sorted({e.gain for row in expected for e in row.values() if e.gain > 0.0})
        for threshold in [0.0, *values]:
            chosen = [self._best(row, threshold) for row in expected]
            pairs = zip(trials, chosen, strict=True)
            gains = self.center.new_tensor([0.0 if name is None else trial.gains[name] for trial, name in pairs])
            if all(_is_no_loss(gains[own]) for own in domains):
                break
        return threshold

    def _fit_candidate(self, row: int, name: str, trials: Sequence[Trial]) -> Tensor:
        """Fit one candidate and return the predictions ``(n,)`` by fits without the trial's domain."""
        x = torch.stack([self._seen(trial, name) for trial in trials])
        y = self.center.new_tensor([t.gains[name] for t in trials])
        domains = _rows_by_domain([t.domain for t in trials])
        tried = {}
        for strength in _STRENGTHS:
            predicted = torch.empty_like(y)
            for out in domains:
                rest = ~out if bool((~out).any()) else out
                weights, mean = _ridge(x[rest], y[rest], strength)
                predicted[out] = mean + x[out] @ weights
            tried[strength] = predicted
        # The strongest of equals: with a single domain nothing shows that anything carries over.
        known = len(domains) > 1
        best = min(reversed(_STRENGTHS), key=lambda s: float((tried[s] - y).square().mean())) if known else math.inf
        self.weights[row], self.means[row] = _ridge(x, y, best)
        self.errors[row] = float((tried[best] - y).square().mean().sqrt())
        return tried[best]


def _ridge(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    mean = y.mean()
    if math.isinf(strength):
        return torch.zeros_like(x[0]), mean
    centred = x - x.mean(0)
    gram = centred.T @ centred + strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, centred.T @ (y - mean))
    return weights, mean - x.mean(0) @ weights


def _lead_errors(misses: Tensor, domains: Sequence[str]) -> Tensor:
    """Return the standard error of each candidate's lead over the plan; 0 for one that was never tried beside it.

    Args:
        misses: ``(n, candidates)`` predicted less realised gains, not finite where a candidate was not tried.
        domains: of the trials.
    """
    leads = misses - misses[:, CANDIDATES.index("plan"), None]
    by_domain = torch.stack([leads[rows].nanmean(0) for rows in _rows_by_domain(domains)])
    return torch.maximum(_error_of_mean(leads), _error_of_mean(by_domain))


def _rows_by_domain(domains: Sequence[str]) -> list[Tensor]:
    """Return for each domain which of the trials ``(n,)`` are its own."""
    return [torch.tensor([domain == each for domain in domains]) for each in sorted({*domains})]


def _error_of_mean(values: Tensor) -> Tensor:
    known = values.isfinite()
    return values.where(known, values.new_zeros(())).square().sum(0).sqrt() / known.sum(0).clamp_min(1)


def _is_no_loss(gains: Tensor) -> bool:
    error = float(gains.std(correction=1)) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return float(gains.mean()) >= -error
