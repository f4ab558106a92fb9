"""The action grid: the same structured set of actions carried out on every one of some episodes, and logged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import DivergedError, Plan, Support, backward_macs, reading_units, tempered_losses
from modmeta.adapters import State, Unit
from modmeta.data import DomainDataModule, Episode
from modmeta.errors import ModmetaError
from modmeta.evaluation.terminal import console
from modmeta.learners import ModularMetaLearner
from modmeta.learners.action_table import Action, describe, indicator_columns, part_file, read_header, write_part
from modmeta.learners.measuring import episode_support

GATES = (0.15, 0.3, 0.6)
RATES = (1 / 3, 1.0, 3.0)
RIDGES = (0.3, 1.0, 3.0)

_DRAWN_BY = (
    "own_classes", "rotations", "mix_domains", "train_domains", "val_domains", "test_domains", "val_classes",
    "test_classes", "test_seen_classes", "image_size", "ways", "eval_ways", "shots", "eval_shots", "queries",
    "eval_queries", "shift_share", "held_out_shifts", "augment", "source_share", "seed",
)  # fmt: skip


def grid_actions(units: Sequence[Unit]) -> list[Action]:
    """Return the grid of some units, actions with the same gates beside each other.

    Nothing; units that only read statistics alone, all together, and their early and late half, at three gates; each
    kind of learning unit over all of the depth, its early and its late half, at a third, once and three times its
    configured rate; all statistics at each gate together with each kind at its configured rate. All of that at three
    strengths of the head's ridge.

    Args:
        units: the learner's units.
    """
    reading = sorted(reading_units(units), key=lambda unit: unit.depth)
    kinds: dict[str, list[Unit]] = {}
    for unit in sorted((unit for unit in units if unit.learns), key=lambda unit: unit.depth):
        kinds.setdefault(unit.module.name, []).append(unit)
    chosen: list[tuple[str, dict[str, float], float]] = [("none", {}, 0.0)]
    for gate in GATES:
        alone = {unit.name: [unit] for unit in reading}
        for name, members in (_ranges("statistics", reading) | alone).items():
            chosen.append((f"{name} {gate:g}", {unit.name: gate for unit in members}, 0.0))
    for kind, own in kinds.items():
        for name, members in _ranges(kind, own).items():
            chosen += [(f"{name} x{rate:.2g}", {unit.name: 1.0 for unit in members}, rate) for rate in RATES]
    for kind, own in kinds.items():
        for gate in GATES if reading else ():
            both = {unit.name: gate for unit in reading} | {unit.name: 1.0 for unit in own}
            chosen.append((f"statistics {gate:g} + {kind} x1", both, 1.0))
    # One unit alone is also all of them where there is one; the first name stays.
    distinct = {(tuple(gates.items()), rate): (name, gates, rate) for name, gates, rate in reversed(chosen)}
    return [
        _action(units, name if ridge == 1.0 else f"{name}, ridge x{ridge:g}", gates, rate, ridge)
        for name, gates, rate in reversed(distinct.values())
        for ridge in RIDGES
    ]


def log_actions(
    learner: ModularMetaLearner,
    datamodule: DomainDataModule,
    split: str,
    episodes: int,
    folder: Path,
    per_part: int = 8,
) -> None:
    """Carry out every action of the grid on the first episodes of a split, as far as that was not done before.

    The episodes' own domains are hidden from all that is known of the sources. The head's ridge is varied behind the
    features: gradient steps are taken at its usual strength.

    Args:
        learner: has measured its sources; its policy is not asked.
        datamodule: gives the episodes.
        split: ``"train"`` (simulated shifts and all numbers of shots), ``"val"`` or ``"test"``.
        episodes: how many, 1 or more.
        folder: where the parts of the table go.
        per_part: episodes in one part; what was finished when a run is stopped is a number of whole parts.

    Raises:
        ModmetaError: if the folder holds the table of another learner or other episodes.
    """
    if episodes < 1 or per_part < 1:
        raise ModmetaError(f"episodes and per_part must be 1 or more, got {episodes} and {per_part}")
    if not learner.sources.ready:
        raise ModmetaError("the learner has not measured its sources yet; an action grid needs them")
    actions = grid_actions(learner.model.units)
    header = table_header(learner, datamodule, split, actions, per_part)
    folder.mkdir(parents=True, exist_ok=True)
    missing = {}
    for part, start in enumerate(range(0, episodes, per_part)):
        numbers = range(start, min(start + per_part, episodes))
        if _rows_done(folder, part, header) < len(numbers) * len(actions):
            missing[part] = numbers
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
                  console=console()) as progress:  # fmt: skip
        bar = progress.add_task("action grid", total=sum(map(len, missing.values())))
        for part, numbers in missing.items():
            rows = []
            for index in numbers:
                try:
                    episode = datamodule.episode(split, index)
                except IndexError as error:
                    raise ModmetaError(f"{error} asked for; raise data.{split}_episodes or lower --episodes") from error
                rows += episode_rows(learner, episode.to(learner.device), actions, header)
                progress.advance(bar)
            write_part(part_file(folder, part), rows, header)


def table_header(
    learner: ModularMetaLearner, datamodule: DomainDataModule, split: str, actions: Sequence[Action], per_part: int
) -> dict[str, Any]:
    """Return what the parts of a table must agree in: the learner to the last bit, the episodes, and the actions."""
    digest = hashlib.sha256()
    tensors = {name: value for name, value in learner.state_dict().items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        # The policy is not asked, the indicators are logged as they are, and what trained the backbone is gone once the
        # learner is loaded.
        if not name.startswith(("policy.", "indicators.", "phase.")):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    drawn = {name: datamodule.hparams[name] for name in _DRAWN_BY}
    return {
        **describe(learner.model.units, learner.indicators, learner.policy.steps),
        "learner": digest.hexdigest(),
        "data": {name: list(value) if isinstance(value, tuple) else value for name, value in drawn.items()},
        "images": datamodule.store.key,
        "split": split,
        "episodes_per_part": per_part,
        "actions": [
            {"name": a.name, "gates": list(a.gates), "rates": list(a.rates), "ridge": a.ridge} for a in actions
        ],
    }


@torch.no_grad()
def episode_rows(
    learner: ModularMetaLearner, episode: Episode, actions: Sequence[Action], header: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return one row per action of what it made of an episode.

    Args:
        learner: has measured its sources.
        episode: on the learner's device.
        actions: what to carry out; those with the same gates stand beside each other.
        header: of the table.

    Raises:
        DivergedError: naming the episode and the action.
    """
    support = episode_support(episode, hide=episode.domain in learner.sources.domains)
    whole, each = learner.indicators.raw(learner.situate(support))
    facts: dict[str, Any] = {
        "episode": episode.index,
        "domain": episode.domain,
        "shots": episode.shots,
        "ways": support.ways,
        "shift": episode.shift or "",
        "strength": episode.strength,
    }
    seen = dict(zip(indicator_columns(header), torch.cat([whole, each.flatten()]).tolist(), strict=True))
    rows = []
    for action, features, macs in _carried_out(learner, episode, support, actions):
        count = len(support.images)
        head = learner.fit_head(features[:count], support, ridge=features.new_tensor(action.ridge))
        logits = head(features[count:])
        if not torch.isfinite(logits).all():
            raise DivergedError(f"episode {episode.index}, action {action.name!r}: the logits are not finite")
        rows.append(
            facts
            | {"action": action.name, "gates": action.gates, "rates": action.rates, "ridge": action.ridge}
            | _figures(logits, episode.query_labels)
            | {"backward_macs": macs}
            | seen
        )
    return rows


def _carried_out(
    learner: ModularMetaLearner, episode: Episode, support: Support, actions: Sequence[Action]
) -> Iterator[tuple[Action, Tensor, int]]:
    """Yield every action with the features of support and query under it, and its backward multiply-accumulates."""
    model, images = learner.model, torch.cat([episode.support, episode.query])
    prefixes: dict[str | None, Tensor] = {None: images}
    for _, same_gates in groupby(actions, key=lambda action: action.gates):
        read: State | None = None
        for _, same_steps in groupby(same_gates, key=lambda action: action.rates):
            group = list(same_steps)
            plan = _plan(learner, group[0], support)
            active = model.active(plan.gate_of())
            if read is None:
                read, _ = learner.carry_out(_plan(learner, group[0], support, steps=0), support)
            try:
                state, _ = learner.carry_out(plan, support, read) if any(group[0].rates) else (read, [])
            except DivergedError as error:
                raise DivergedError(f"episode {episode.index}, action {group[0].name!r}: {error}") from error
            start = model.cut_before(active)
            if start not in prefixes:
                prefixes[start] = model.backbone.run(images, stop=start)
            features = model(prefixes[start], state, plan.gate_of(), start=start) if active else prefixes["features"]
            macs = backward_macs(model, active, len(support.images), plan.steps)
            for action in group:
                yield action, features, macs


def _plan(learner: ModularMetaLearner, action: Action, support: Support, steps: int | None = None) -> Plan:
    device, units = learner.device, tuple(unit.name for unit in learner.model.units)
    steps = learner.policy.steps if steps is None else steps
    bank = torch.zeros(len(units), 1 + len(learner.bank.visible(support.hidden)), device=device)
    bank[:, 0] = 1.0
    zero = torch.zeros((), device=device)
    rates = torch.tensor(action.rates, device=device)
    gates, decay = torch.tensor(action.gates, device=device), torch.zeros(len(units), device=device)
    return Plan(units, gates, rates[:, None].expand(-1, steps), decay, bank, zero + 1, zero, zero)


def _figures(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return losses and accuracy on the query, and on its even and its odd images alone.

    The halves tell what choosing by one of them is worth on the other.
    """
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    hits = (logits.argmax(1) == labels).double()
    halves = [slice(0, None, 2), slice(1, None, 2)]
    return {
        "nll": float(losses.mean()),
        "tempered_nll": float(tempered_losses(logits, labels).mean()),
        "accuracy": float(hits.mean()),
        "half_nll": [float(losses[half].mean()) for half in halves],
        "half_tempered_nll": [float(tempered_losses(logits[half], labels[half]).mean()) for half in halves],
        "half_accuracy": [float(hits[half].mean()) for half in halves],
    }


def _ranges(name: str, units: list[Unit]) -> dict[str, list[Unit]]:
    half = (len(units) + 1) // 2
    ranges = {name: units, f"{name} early": units[:half], f"{name} late": units[half:]}
    return {label: members for label, members in ranges.items() if members}


def _action(units: Sequence[Unit], name: str, gates: dict[str, float], rate: float, ridge: float) -> Action:
    rates = [rate * unit.rate if unit.learns and unit.name in gates else 0.0 for unit in units]
    return Action(name, tuple(gates.get(unit.name, 0.0) for unit in units), tuple(rates), ridge)


def _rows_done(folder: Path, part: int, header: dict[str, Any]) -> int:
    path = part_file(folder, part)
    if not path.exists():
        return 0
    found, rows = read_header(path)
    if found != header:
        different = next(key for key in header if found.get(key) != header[key])
        raise ModmetaError(f"{path} is of another {different}; give another folder")
    return rows
