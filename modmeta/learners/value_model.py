"""The value model: from a domain's indicators and an action to what the action does to the query loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modmeta.learners.action_table import ActionTable

LIMIT = 0.5
"""Nats beyond which a change counts no more: a ruinous action is not to be known any better than as ruinous."""

_CONSTANT = 10.0
_STRENGTHS = tuple(10.0**power for power in range(-4, 3))


@dataclass(frozen=True)
class ValueModel:
    """A bilinear ridge regression ``change[e, a] = context[e] W features[a]``.

    The idle action has no features, so its change is exactly 0.

    Attributes:
        center: ``(C,)`` mean of the contexts that it was fitted to; ``scale`` ``(C,)`` their deviation.
        weight: ``(1 + C, P)``, first what an action does to every domain alike.
        strength: of the ridge, per episode and action.
    """

    center: Tensor
    scale: Tensor
    weight: Tensor
    strength: float

    def changes(self, table: ActionTable) -> Tensor:
        """Return the predicted change of the tempered query loss by every action ``(E, A)``, in nats."""
        return self._standard(contexts(table)) @ self.weight @ action_features(table).T

    def _standard(self, context: Tensor) -> Tensor:
        x = ((context - self.center) / self.scale).clamp(-3.0, 3.0)
        # A large constant makes its weights cheap: what an action does everywhere is hardly shrunk.
        return torch.cat([torch.full_like(x[:, :1], _CONSTANT), x], dim=1)


def changes(table: ActionTable) -> Tensor:
    """Return what every action changed the tempered query loss by ``(E, A)``, in nats; below 0 is a gain."""
    losses = table.figures["tempered_nll"]
    return losses - losses[:, table.idle, None]


def fit_value_model(table: ActionTable, rows: Tensor | None = None) -> ValueModel:
    """Fit a value model; the ridge's strength is what predicts left-out domains best.

    Args:
        table: the logged episodes.
        rows: ``(N,)`` indices of those to fit to; None takes all.
    """
    rows = torch.arange(len(table.episodes)) if rows is None else rows
    names = sorted({table.domains[row] for row in rows.tolist()})
    # With a single domain, episodes are left out instead.
    group = torch.tensor([names.index(table.domains[r]) if len(names) > 1 else r % 4 for r in rows.tolist()])
    errors = dict.fromkeys(_STRENGTHS, 0.0)
    target = changes(table).clamp(-LIMIT, LIMIT)
    for held_out in group.unique():
        rest, judged = rows[group != held_out], rows[group == held_out]
        if len(rest):
            for model in _fit(table, rest, _STRENGTHS):
                errors[model.strength] += float((model.changes(table)[judged] - target[judged]).square().sum())
    return _fit(table, rows, [min(_STRENGTHS, key=errors.__getitem__)])[0]


def contexts(table: ActionTable) -> Tensor:
    """Return the global indicators, and those per unit as means over the early and the late half ``(E, C)``."""
    depths = [unit["depth"] for unit in table.header["units"]]
    order = sorted(range(len(depths)), key=depths.__getitem__)
    half = (len(order) + 1) // 2
    early, late = table.each[:, order[:half]], table.each[:, order[half:] or order]
    return torch.cat([table.whole, early.mean(1), late.mean(1)], dim=1).double()


def action_features(table: ActionTable) -> Tensor:
    """Return what describes every action ``(A, P)``: gates, log rates of open units, log ridge, and their squares."""
    gates = torch.tensor([action.gates for action in table.actions], dtype=torch.double)
    rates = torch.tensor([action.rates for action in table.actions], dtype=torch.double)
    log_ridge = torch.tensor([action.ridge for action in table.actions], dtype=torch.double).log()
    columns = [log_ridge, log_ridge.square()]
    for index, unit in enumerate(table.header["units"]):
        gate = gates[:, index]
        columns.append(gate)
        if unit["learns"]:
            log_rate = torch.where(gate > 0, (rates[:, index] / unit["rate"]).clamp_min(1e-6).log(), 0.0)
            columns += [gate * log_rate, gate * log_rate.square()]
        else:
            columns.append(gate.square())
    features = torch.stack(columns, dim=1)
    return features / features.square().mean(0).sqrt().clamp_min(1e-9)


def _fit(table: ActionTable, rows: Tensor, strengths: tuple[float, ...] | list[float]) -> list[ValueModel]:
    """Return the minimisers of ``|Y - Z W F'|^2 + strength * |W|^2`` in closed form, by two singular value problems."""
    context = contexts(table)[rows]
    center, scale = context.mean(0), context.std(0, correction=0)
    scale = torch.where(scale > 1e-4, scale, torch.ones_like(scale))
    blank = ValueModel(center, scale, context.new_zeros(0, 0), 0.0)
    features, target = action_features(table), changes(table)[rows].clamp(-LIMIT, LIMIT)
    u, s, v = torch.linalg.svd(blank._standard(context), full_matrices=False)
    a, t, b = torch.linalg.svd(features, full_matrices=False)
    inner, sizes = u.T @ target @ a, s[:, None] * t
    return [
        ValueModel(center, scale, v.T @ (inner * sizes / (sizes.square() + strength * target.numel())) @ b, strength)
        for strength in strengths
    ]
