"""Warm start: a policy that says to every logged episode what a value model thinks best for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import IndicatorSet, Policy
from modmeta.adapters import Unit
from modmeta.learners.action_table import ActionTable, read_table
from modmeta.learners.value_model import changes, fit_value_model

_STEPS = 300
_BATCH = 256
_LEARNING_RATE = 5e-3


def table_for(folder: str | Path, policy: Policy, indicators: IndicatorSet, units: Sequence[Unit]) -> ActionTable:
    """Read an action table that a policy is to start from.

    Raises:
        ModmetaError: if it cannot be read, or is of other units, indicators or steps.
    """
    table = read_table(folder)
    table.check(units, indicators, policy.steps)
    return table


def start_from_table(table: ActionTable, policy: Policy, indicators: IndicatorSet, units: Sequence[Unit]) -> None:
    """Regress a policy's gates, rates, ridge and forecast onto the best action of every logged episode.

    Best is what a value model of the table says: the episode's own losses are too noisy to follow. What comes out, the
    indicators' standardisation included, is a function of the table alone, whatever the policy was before.

    Args:
        table: of these units and indicators, see :func:`table_for`.
        policy: takes the result; its shape stays.
        indicators: are standardised on the table's episodes.
        units: what the policy decides about.
    """
    indicators.fit(list(zip(table.whole, table.each, strict=True)))
    best = fit_value_model(table).changes(table).argmin(1)
    found = _regress(table, best, policy.steps, indicators, units)
    policy.load_state_dict(found.state_dict())


def _regress(table: ActionTable, best: Tensor, steps: int, indicators: IndicatorSet, units: Sequence[Unit]) -> Policy:
    gates = torch.tensor([table.actions[a].gates for a in best.tolist()])
    rates = torch.tensor([table.actions[a].rates for a in best.tolist()])
    ridge = torch.tensor([table.actions[a].ridge for a in best.tolist()])
    gain = -changes(table).gather(1, best[:, None])[:, 0].float()
    moved = (gates > 0) & torch.tensor([unit.learns for unit in units])
    whole, each = indicators.standardise(table.whole, table.each)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        policy = Policy(indicators.global_width, indicators.unit_width, steps)

        def decide(whole: Tensor, each: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            plan = policy(units, whole, each)
            return plan.gates, plan.rates, plan.ridge, plan.gain, plan.gain_log_variance

        optimizer = torch.optim.Adam(policy.parameters(), lr=_LEARNING_RATE)
        for step in range(_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * (1 - step / _STEPS)
            rows = torch.randperm(len(best))[:_BATCH]
            g, r, head, forecast, log_variance = torch.vmap(decide)(whole[rows], each[rows])
            loss = (g - gates[rows]).square().mean()
            loss = loss + ((head.log() - ridge[rows].log()) / policy.log_spread).square().mean()
            loss = loss + F.gaussian_nll_loss(forecast, gain[rows], log_variance.exp(), eps=1e-4)
            if moved[rows].any():
                gaps = (r.log() - rates[rows].clamp_min(1e-12).log()[..., None]) / policy.log_spread
                loss = loss + gaps[moved[rows]].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return policy
