"""Why an adaptation did what it did: per unit what the policy saw, what it decided, and what came of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import PRIOR, Adapted, Support
from modmeta.learners import MetaLearner, ModularMetaLearner

_DOTS_PER_INCH = 120
_STATIC = "place"  # where and what a unit is; the same for every domain


@torch.no_grad()
def explain(
    learner: MetaLearner, support: Support, adapted: Adapted, units: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the explanation of an adaptation as plain data.

    The effect of a unit is what changes when it alone is left out of the adapted model: the loss of the support
    images (positive where the unit helps), the mean total variation between the predictions, 0 to 1, and the share of
    images that change class. A head is fitted again without the unit, and with labels every image is predicted by a
    head that has not seen it; but the other units have, and stay as they are.

    Args:
        learner: what adapted.
        support: the images it adapted to; without labels there is no loss.
        adapted: the outcome.
        units: the units' entries of its card.
    """
    domain, each = _seen(learner, support)
    gates = adapted.plan.gate_of()
    ridge = None if (adapted.report.get("verdict") or {}).get("choice") == PRIOR else adapted.plan.ridge
    whole = _predict(learner, support, adapted, gates, ridge)
    rows = []
    for unit, seen in zip(learner.model.units, each, strict=True):
        entry = next(entry for entry in units if entry["name"] == unit.name)
        kept = {name: entry[name] for name in ("name", "planned_gate", "gate", "rates", "learns", "moved")}
        effect = None
        if unit.name in gates:
            rest = {name: gate for name, gate in gates.items() if name != unit.name}
            effect = _effect(whole, _predict(learner, support, adapted, rest, ridge), support.labels)
        rows.append(kept | {"depth": unit.depth, "indicators": seen, "effect": effect})
    loss = None if support.labels is None else float(F.cross_entropy(whole, support.labels))
    return {"held_out_loss": loss, "domain": domain, "units": rows}


def explanation_tables(explanation: dict[str, Any]) -> list[Table]:
    """Return the explanation as tables for the terminal: the domain, what was seen of each unit, and its effect."""
    tables = []
    if explanation["domain"]:
        tables.append(_table("what the policy saw of the domain", NUMBER_HEADINGS))
        for number in explanation["domain"]:
            tables[-1].add_row(*number_cells(number))
        columns = [_heading(n) for n in explanation["units"][0]["indicators"] if _changes(n)]
        tables.append(_table("and of each unit", ("unit", *columns)))
        for unit in explanation["units"]:
            tables[-1].add_row(unit["name"], *(f"{n['value']:.2f}" for n in unit["indicators"] if _changes(n)))
    tables.append(_table("what each unit did", EFFECT_HEADINGS))
    for unit in explanation["units"]:
        tables[-1].add_row(*effect_cells(unit), style="dim" if unit["effect"] is None else None)
    return tables


NUMBER_HEADINGS = ("indicator", "number", "value", "deviations")
EFFECT_HEADINGS = (
    "unit",
    "depth",
    "planned gate",
    "gate",
    "mean rate",
    "moved",
    "loss without",
    "predictions moved",
    "classes changed",
)


def number_cells(number: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a number's row under :data:`NUMBER_HEADINGS`."""
    return (number["indicator"], number["number"], f"{number['value']:.3f}", f"{number['deviations']:+.1f}")


def effect_cells(unit: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a unit's row under :data:`EFFECT_HEADINGS`."""
    rates = unit["rates"] if unit["learns"] and unit["gate"] > 0 else []
    rate = f"{sum(rates) / len(rates):.4f}" if rates else "-"
    first = (unit["name"], f"{unit['depth']:.2f}", f"{unit['planned_gate']:.2f}", f"{unit['gate']:.2f}", rate)
    effect = unit["effect"]
    if effect is None:
        return (*first, "-", "-", "-", "-")
    loss = "-" if effect["loss"] is None else f"{effect['loss']:+.4f}"
    return (*first, f"{unit['moved']:.4f}", loss, f"{effect['predictions']:.4f}", f"{100 * effect['classes']:.0f} %")


def explanation_picture(explanation: dict[str, Any]) -> bytes:
    """Return a PNG of gates, movements and effects over the depth of the backbone."""
    units = explanation["units"]
    modules = list(dict.fromkeys(unit["name"].partition("@")[0] for unit in units))
    places, width = _places([unit["depth"] for unit in units])
    labelled = explanation["held_out_loss"] is not None
    figure = Figure(figsize=(8, 7), dpi=_DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(3, sharex=True)
    for number, module in enumerate(modules):
        mine = [(place, unit) for place, unit in zip(places, units, strict=True) if _is(unit, module)]
        x, color = [place for place, _ in mine], f"C{number}"
        effects = [(unit["effect"] or {"loss": 0.0, "predictions": 0.0}) for _, unit in mine]
        panels[0].bar(x, [unit["gate"] for _, unit in mine], width, color=color, label=module)
        panels[0].bar(x, [unit["planned_gate"] for _, unit in mine], width, fill=False, edgecolor=color)
        panels[1].bar(x, [unit["moved"] for _, unit in mine], width, color=color)
        panels[2].bar(x, [e["loss" if labelled else "predictions"] for e in effects], width, color=color)
    if any(unit["moved"] > 0 for unit in units):
        panels[1].set_yscale("log")  # what is read off the images moves by far more than what a step moves
    panels[2].axhline(0, color="0.6", linewidth=0.6)
    effect = "loss without it, in nats more" if labelled else "predictions moved"
    for axes, label in zip(panels, ("gate (outline: planned)", "movement, RMS", effect), strict=True):
        axes.set_ylabel(label)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[2].set_xlabel("depth in the backbone, from images (0) to features (1)")
    panels[0].legend(fontsize=8, ncols=min(len(modules), 5), loc="lower left", bbox_to_anchor=(0, 1))
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def _is(unit: Mapping[str, Any], module: str) -> bool:
    return bool(unit["name"].partition("@")[0] == module)


def _places(depths: Sequence[float]) -> tuple[list[float], float]:
    """Return where bars go, at their depths or as near behind them as leaves them apart, and their width."""
    width = min(0.03, 0.7 / len(depths))
    places, free = [0.0] * len(depths), -1.0
    for index in sorted(range(len(depths)), key=lambda index: depths[index]):
        places[index] = max(depths[index], free)
        free = places[index] + 1.15 * width
    return places, width


def _seen(learner: MetaLearner, support: Support) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Return the numbers that the policy saw, of the domain and of each unit; none without a policy."""
    if not isinstance(learner, ModularMetaLearner):
        return [], [[] for _ in learner.model.units]
    situation = learner.situate(support)
    raw, standard = learner.indicators.raw(situation), learner.indicators(situation)

    def described(per_unit: bool, values: Tensor, deviations: Tensor) -> list[dict[str, Any]]:
        names = learner.indicators.numbers(per_unit)
        return [
            {"indicator": indicator, "number": number, "value": value, "deviations": deviation}
            for (indicator, number), value, deviation in zip(names, values.tolist(), deviations.tolist(), strict=True)
        ]

    whole = described(False, raw[0], standard[0])
    return whole, [described(True, *both) for both in zip(raw[1], standard[1], strict=True)]


def _predict(
    learner: MetaLearner, support: Support, adapted: Adapted, gates: Mapping[str, Tensor], ridge: Tensor | None
) -> Tensor:
    """Return logits ``(S, C)`` of the support under some of the adapted units."""
    features = learner.model(support.images, adapted.state, gates)
    if support.labels is None:
        return learner.fit_head(features, support)(features)
    anchor = learner.sources.view(support.hidden).anchor(support.classes)
    return learner.head.held_out(features, support.labels, support.ways, anchor, ridge)


def _effect(whole: Tensor, rest: Tensor, labels: Tensor | None) -> dict[str, float | None]:
    loss = None
    if labels is not None:
        loss = float(F.cross_entropy(rest, labels) - F.cross_entropy(whole, labels))
    moved = 0.5 * (whole.softmax(-1) - rest.softmax(-1)).abs().sum(-1).mean()
    changed = (whole.argmax(-1) != rest.argmax(-1)).float().mean()
    return {"loss": loss, "predictions": float(moved), "classes": float(changed)}


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title)
    for heading in headings:
        words = heading in ("unit", "indicator", "number")
        table.add_column(heading, justify="left" if words else "right", no_wrap=words)
    return table


def _heading(number: Mapping[str, Any]) -> str:
    return f"{number['indicator']}\n{number['number']}"


def _changes(number: Mapping[str, Any]) -> bool:
    return bool(number["indicator"] != _STATIC)
