"""The adaptation card: what an adaptation did and why, every figure computed, as JSON and Markdown."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from rich.table import Table
from torch import Tensor

from modmeta.adaptation import PRIOR, Adapted, Support, backward_macs, backward_shares
from modmeta.adapters import Unit
from modmeta.adapters.provenance import describe_images
from modmeta.evaluation.abstention import abstention_sentence
from modmeta.evaluation.explanation import (
    EFFECT_HEADINGS,
    NUMBER_HEADINGS,
    effect_cells,
    explanation_picture,
    number_cells,
)
from modmeta.evaluation.systems.learned import learner_backward_macs
from modmeta.files import write_atomically
from modmeta.learners import MetaLearner

_PACKAGES = ("modmeta", "torch", "timm", "lightning", "safetensors")


def provenance(support: Support, level: str = "hashes", names: Sequence[str] = ()) -> dict[str, Any]:
    """Return where an adaptation comes from, as plain data: its images, and the versions of the libraries.

    Args:
        support: the images.
        level: what is said of them besides their number: see :func:`~modmeta.adapters.provenance.describe_images`.
        names: names of their files, for the level ``full``.
    """
    return {
        "domain": support.domain,
        "images": len(support.images),
        "images_per_class": _images_per_class(support),
        **describe_images(support.images, level, names),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }


@torch.no_grad()
def make_card(
    learner: MetaLearner, support: Support, adapted: Adapted, seconds: float, origin: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the card of an adaptation as plain data.

    Args:
        learner: what adapted.
        support: the images it adapted to.
        adapted: the outcome.
        seconds: how long it took.
        origin: what :func:`provenance` returned, and more; None is its default.
    """
    backbone, report = learner.model.backbone, adapted.report
    return {
        "decision": _decision(adapted, len(learner.model.units)),
        "classes": list(adapted.classes),
        "labelled": support.labels is not None,
        "units": [_unit(learner, adapted, unit) for unit in learner.model.units],
        "updated": learner.updated(adapted),
        "backward": _backward(learner, support, adapted),
        "expected_gain": report.get("expected_gain"),
        "expected_gain_deviation": report.get("expected_gain_deviation"),
        "statistics_depths": report.get("statistics_depths", {}),
        "statistics_strengths": report.get("statistics_strengths", {}),
        "explained": report.get("explained", False),
        "unadapted_loss": report.get("unadapted_loss"),
        "unadapted_share": report.get("unadapted_share"),
        "wrong_labels": report.get("wrong_labels", {}),
        "verdict": report.get("verdict"),
        "support_losses": report.get("support_losses", []),
        "backbone": {
            "name": backbone.name,
            "fingerprint": backbone.fingerprint(),
            "preprocessing": backbone.preprocessing,
        },
        "provenance": provenance(support) if origin is None else origin,
        "seconds": seconds,
    }


def write_card(adapter: str | Path, card: dict[str, Any]) -> tuple[Path, ...]:
    """Write ``NAME.md``, ``NAME.json`` and, of an explanation, ``NAME.png`` beside the adapter file; return them."""
    markdown, data = Path(adapter).with_suffix(".md"), Path(adapter).with_suffix(".json")
    write_atomically(data, (json.dumps(card, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(markdown, render_markdown(Path(adapter).name, card).encode())
    if "explanation" not in card:
        return markdown, data
    picture = Path(adapter).with_suffix(".png")
    write_atomically(picture, explanation_picture(card["explanation"]))
    return markdown, data, picture


def card_table(card: dict[str, Any]) -> Table:
    """Return the units of a card as a table for the terminal."""
    table = Table(title=f"adaptation in {card['seconds']:.1f} s")
    for heading in _UNIT_HEADINGS:
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for unit in card["units"]:
        table.add_row(*_unit_cells(unit), style=None if unit["open"] else "dim")
    return table


def render_markdown(name: str, card: dict[str, Any]) -> str:
    """Return a card as a Markdown page.

    Args:
        name: name of the adapter file.
        card: what :func:`make_card` returned.
    """
    origin, verdict = card["provenance"], card["verdict"]
    lines = [f"# Adapter {_text(name)}", "", _text(card["decision"]), ""]
    lines += ["## Units", "", *_table(_UNIT_HEADINGS, map(_unit_cells, card["units"])), ""]
    lines += [
        "The planned gate is the policy's; the gate is what was carried out after the veto. Moved: root mean "
        "square change of the unit's own tensors. Effect: size of the change of the backbone's tensors "
        "relative to their own size; units that add computation have none.",
        "",
    ]
    if card["expected_gain"] is not None:
        gain, deviation = card["expected_gain"], card["expected_gain_deviation"]
        lines += [
            f"The policy expected a gain of {gain:+.3f} ± {deviation:.3f} nats per image from its plan.",
            "",
        ]
    if card["statistics_strengths"]:
        sentence = _statistics_sentence(card["statistics_depths"], card["statistics_strengths"], card["explained"])
        lines += [sentence, ""]
    if card["wrong_labels"]:
        opened = [unit for unit in card["units"] if unit["open"]]
        learned = any(unit["learns"] for unit in opened)
        lines += [_labels_sentence(card["wrong_labels"], learned, bool(opened)), ""]
    lines += [_cost_sentence(card["backward"]), ""]
    if verdict is not None:
        rows = [(who, f"{gain:+.3f}", f"{verdict['errors'][who]:.3f}") for who, gain in verdict["gains"].items()]
        lines += [
            "## Veto",
            "",
            f"Chosen: **{_text(verdict['choice'])}**, on {verdict['evidence']} evidence images.",
            "",
        ]
        lines += [*_table(("candidate", "gain in nats", "error"), rows), ""]
    if "explanation" in card:
        lines += _explanation(name, card["explanation"])
    lines += [
        "## Images",
        "",
        f"{origin['images']} images, {'labelled' if card['labelled'] else 'without labels'}.",
    ]
    if origin["domain"]:
        lines += [f"Domain: {_text(origin['domain'])}."]
    if origin["images_per_class"]:
        lines += [
            "",
            *_table(("class", "images"), ((k, str(n)) for k, n in origin["images_per_class"].items())),
        ]
    else:
        lines += ["", f"Classes, as the source domains know them: {_text(', '.join(card['classes']))}."]
    if "abstention" in origin:
        lines += ["", abstention_sentence(origin["abstention"])]
    versions = ", ".join(f"{package} {number}" for package, number in origin["versions"].items())
    lines += ["", *_privacy(origin), "", "## Origin", ""]
    lines += [f"- backbone: {_text(card['backbone']['name'])}, `{card['backbone']['fingerprint']}`"]
    lines += [f"- versions: {versions}", f"- adaptation took {card['seconds']:.2f} s", ""]
    return "\n".join(lines)


def _privacy(origin: dict[str, Any]) -> list[str]:
    """Return what the adapter file tells of single images."""
    lines = []
    if "privacy" in origin:
        p = origin["privacy"]
        lines += [
            f"Adapted in private: ({p['epsilon']:.3g}, {p['delta']:.3g})-differential privacy against the replacement "
            f"of one image by another of its class, by {p['steps']} steps with contributions clipped to {p['clip']:g} "
            f"and noise of {p['noise_multiplier']:.3f} times their sensitivity.",
            "",
        ]
    if "hashes" not in origin:
        return [*lines, "The file names no image, and holds no hash of any."]
    lines += [f"The file holds {len(origin['hashes'])} salted hashes of its images, salt `{origin['salt'][:16]}...`."]
    if "names" in origin:
        lines += ["", *_table(("image",), ([name] for name in origin["names"]))]
    return lines


def _explanation(name: str, explanation: dict[str, Any]) -> list[str]:
    lines = ["## What each unit did", "", f"![over the depth of the backbone]({quote(Path(name).stem)}.png)", ""]
    lines += [
        *_table(EFFECT_HEADINGS, map(effect_cells, explanation["units"])),
        "",
        "Loss without: how much higher the loss of held-out support images is when this unit alone is left out. "
        "Predictions moved: mean total variation between the predictions with and without it.",
        "",
    ]
    if explanation["domain"]:
        numbers = _table(NUMBER_HEADINGS, map(number_cells, explanation["domain"]))
        lines += ["## What the policy saw of the domain", "", *numbers, ""]
    return lines


_UNIT_HEADINGS = ("unit", "planned gate", "gate", "rates per step", "parameters", "moved", "effect")


def _unit_cells(unit: dict[str, Any]) -> tuple[str, ...]:
    planned = f"{unit['planned_gate']:.2f}" if unit["planned_gate"] > 0 else "closed"
    if not unit["open"]:
        return (unit["name"], planned, "closed", "-", str(unit["parameters"]), "-", "-")
    rates = " ".join(f"{rate:.3f}" for rate in unit["rates"]) if unit["learns"] else "no gradient"
    effect = "-" if unit["relative_change"] is None else f"{100 * unit['relative_change']:.2f} %"
    moved = f"{unit['moved']:.4f}"
    return (unit["name"], planned, f"{unit['gate']:.2f}", rates, str(unit["parameters"]), moved, effect)


def _unit(learner: MetaLearner, adapted: Adapted, unit: Unit) -> dict[str, Any]:
    plan = adapted.plan
    row = plan.index(unit.name)
    gate = float(plan.gates[row])
    planned = adapted.report.get("plan")
    return {
        "name": unit.name,
        "module": unit.module.name,
        "sites": [site.name for site in unit.sites],
        "parameters": unit.cost.parameters,
        "learns": unit.learns and adapted.report.get("labelled", True),
        "open": gate > 0,
        "gate": gate,
        "planned_gate": planned["gates"][row] if planned else gate,
        "rates": plan.rates[row].tolist(),
        "moved": _moved(learner, adapted, unit) if gate > 0 else 0.0,
        "relative_change": _relative_change(learner, adapted, unit) if gate > 0 else 0.0,
    }


def _backward(learner: MetaLearner, support: Support, adapted: Adapted) -> dict[str, Any]:
    """Return what the adaptation cost in backward passes, and how much of its budget the steps took."""
    model = learner.model
    learned = support.labels is not None
    share = adapted.plan.backward_share(backward_shares(model)) if learned else 0.0
    budget = getattr(learner, "budget", None)
    opened = model.active(adapted.plan.gate_of())
    steps = adapted.plan.steps if learned else 0
    return {
        "budget": budget,
        "share": share,
        "below_budget": None if budget is None else budget - share,
        "macs_of_steps": backward_macs(model, opened, len(support.images), steps),
        "macs": learner_backward_macs(learner, support, adapted),
    }


def _statistics_sentence(depths: dict[str, float], strengths: dict[str, float], explained: bool) -> str:
    def listed(gains: dict[str, float]) -> str:
        return ", ".join(f"{key}: {gain:+.3f}" for key, gain in gains.items())

    deep = f"Depths down to which statistics were tried, {listed(depths)}; then s" if depths else "S"
    return (
        f"{deep}trengths of the statistics, as multiples of the policy's gates, {listed(strengths)}: each with the "
        "gain in nats per image by heads that had not seen it. "
        + ("The images are explained without any, so none were to be taken but for a sure gain. " if explained else "")
        + "The planned gates hold what was taken."
    )


_HELD_BACK = (
    " The head on adapted features was held back by a stronger ridge, as the labels are doubted or a class has no "
    "image whose label is believed."
)


def _labels_sentence(wrong: dict[str, float], learned: bool, adapted: bool) -> str:
    consequence = ""
    if not wrong["learning"]:
        consequence = ": too small for anything to learn from them"
    elif wrong["left_out"] and learned:
        consequence = (
            f", so nothing was learned from {wrong['left_out']:g} whose label these heads give less than chance; the "
            f"learning rates were multiplied by that chance among the others, {100 * wrong['learning']:.0f} %"
        )
    elif wrong["learning"] < 1 and learned:
        consequence = "; the learning rates were multiplied by that"
    return (
        f"Labels that look wrong to heads that had not seen their image: {100 * wrong['expected']:.1f} %. The chance "
        f"that no more are wrong than the {100 * wrong['reckoned']:g} % that are reckoned with is "
        f"{100 * wrong['trust']:.0f} %{consequence}." + (_HELD_BACK if wrong["held_back"] and adapted else "")
    )


def _cost_sentence(backward: dict[str, Any]) -> str:
    budget = "" if backward["budget"] is None else f", {100 * backward['below_budget']:.1f} % below the budget"
    return (
        f"Backward cost of the steps: {100 * backward['share']:.1f} % of steps on all learning units{budget} "
        f"({backward['macs_of_steps'] / 1e9:.3g} G multiply-accumulates; with indicators and veto "
        f"{backward['macs'] / 1e9:.3g} G)."
    )


def _moved(learner: MetaLearner, adapted: Adapted, unit: Unit) -> float:
    initial = learner.bank.initial()
    names = [name for name in initial if name.startswith(f"{unit.name}|")]
    return _norm(adapted.state[name] - initial[name] for name in names) / max(
        1.0, sum(initial[name].numel() for name in names) ** 0.5
    )


def _relative_change(learner: MetaLearner, adapted: Adapted, unit: Unit) -> float | None:
    new = learner.model.overlay(adapted.state, adapted.plan.gate_of(), [unit])
    if not new:
        return None
    old = learner.model.backbone.tensors()
    return _norm(tensor - old[name] for name, tensor in new.items()) / max(1e-12, _norm(old[name] for name in new))


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5)


def _decision(adapted: Adapted, units: int) -> str:
    verdict = adapted.report.get("verdict")
    count = len(adapted.plan.gate_of())
    if verdict is not None and verdict["choice"] == PRIOR:
        return "Nothing was adapted but the head: the evidence did not speak for the plan."
    chosen = f" (candidate {verdict['choice']!r})" if verdict else ""
    return f"{count} of {units} units were adapted{chosen}.{_shared(adapted)}"


def _shared(adapted: Adapted) -> str:
    if adapted.prior is None:
        return ""
    share = adapted.report.get("unadapted_share")
    much = "" if share is None else f" of {100 * share:.0f} %"
    return f" The unadapted model has a share{much} in every answer, which costs it a second forward pass."


def _images_per_class(support: Support) -> dict[str, int]:
    if support.labels is None:
        return {}
    counts = Counter(support.labels.tolist())
    return {name: counts[index] for index, name in enumerate(support.classes)}


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(headings)
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _text(text: str) -> str:
    """Make a name that a user chose harmless in Markdown."""
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
