"""What an explanation says of each unit, against adapted models with that unit left out by hand."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from modmeta.adaptation import Adapted, Support
from modmeta.adapters import State
from modmeta.evaluation.card import make_card, render_markdown
from modmeta.evaluation.explanation import explain, explanation_picture, explanation_tables
from modmeta.evaluation.terminal import console
from modmeta.learners import MetaLearner, ModularMetaLearner


def explained(learner: ModularMetaLearner, support: Support) -> tuple[Adapted, dict[str, Any]]:
    with torch.no_grad():
        adapted = learner.adapt(support)
    card = make_card(learner, support, adapted, 0.1)
    card["explanation"] = explain(learner, support, adapted, card["units"])
    return adapted, card


def without(learner: ModularMetaLearner, adapted: Adapted, unit: str) -> tuple[State, dict[str, float]]:
    """Return the adapted state with a unit as it is when fresh, which is the identity."""
    fresh = learner.model.fresh()
    state = {n: fresh[n] if n.startswith(f"{unit}|") else tensor for n, tensor in adapted.state.items()}
    return state, {name: float(gate) for name, gate in adapted.plan.gate_of().items()}


@torch.no_grad()
def test_effects_are_those_of_putting_a_unit_back(modular: ModularMetaLearner, labelled: Support) -> None:
    assert labelled.labels is not None
    adapted, card = explained(modular, labelled)
    assert len(adapted.plan.gate_of()) == len(modular.model.units) > 3
    head, anchor = modular.head, modular.sources.view(None).anchor(labelled.classes)

    def held_out(features: torch.Tensor) -> torch.Tensor:
        assert labelled.labels is not None
        return head.held_out(features, labelled.labels, 3, anchor, adapted.plan.ridge)

    whole = held_out(modular.model(labelled.images, adapted.state, adapted.plan.gate_of()))
    assert card["explanation"]["held_out_loss"] == pytest.approx(float(F.cross_entropy(whole, labelled.labels)), 1e-4)
    for entry in card["explanation"]["units"]:
        state, gates = without(modular, adapted, entry["name"])
        rest = held_out(modular.model(labelled.images, state, gates))
        more = float(F.cross_entropy(rest, labelled.labels) - F.cross_entropy(whole, labelled.labels))
        moved = float((whole.softmax(1) - rest.softmax(1)).clamp_min(0).sum(1).mean())
        changed = float((whole.argmax(1) != rest.argmax(1)).float().mean())
        assert entry["effect"]["loss"] == pytest.approx(more, abs=1e-4)
        assert entry["effect"]["predictions"] == pytest.approx(moved, abs=1e-4)
        assert entry["effect"]["classes"] == pytest.approx(changed)
    assert max(abs(entry["effect"]["loss"]) for entry in card["explanation"]["units"]) > 1e-3


def test_it_shows_what_the_policy_saw(modular: ModularMetaLearner, labelled: Support) -> None:
    _, card = explained(modular, labelled)
    whole, each = modular.indicators.raw(modular.situate(labelled))
    found = card["explanation"]
    assert [number["value"] for number in found["domain"]] == pytest.approx(whole.tolist())
    for entry, row, unit in zip(found["units"], each, modular.model.units, strict=True):
        assert [number["value"] for number in entry["indicators"]] == pytest.approx(row.tolist())
        assert (entry["name"], entry["depth"]) == (unit.name, unit.depth)
        depth = next(n for n in entry["indicators"] if (n["indicator"], n["number"]) == ("place", "depth"))
        assert depth["value"] == pytest.approx(unit.depth)


@torch.no_grad()
def test_images_without_labels_have_effects_on_predictions_alone(
    modular: ModularMetaLearner, labelled: Support
) -> None:
    support = Support(labelled.images, None, modular.sources.classes)
    adapted, card = explained(modular, support)
    found = card["explanation"]
    assert found["held_out_loss"] is None
    for entry in found["units"]:
        if entry["name"] not in adapted.plan.gate_of():
            assert entry["effect"] is None
            assert not entry["name"].startswith("norm_blend")
            continue
        whole = adapted.classifier(modular.model(support.images, adapted.state, adapted.plan.gate_of()))
        features = modular.model.backbone(support.images)  # nothing but this unit was open
        rest = modular.fit_head(features, support)(features)
        moved = float((whole.softmax(1) - rest.softmax(1)).abs().sum(1).mean() / 2)
        assert entry["effect"]["loss"] is None
        assert entry["effect"]["predictions"] == pytest.approx(moved, abs=1e-4)
        assert moved > 1e-3
    assert "predictions" in render_markdown("a.safetensors", card).lower()
    assert explanation_picture(found)[:4] == b"\x89PNG"


def test_tables_pictures_and_pages_hold_it_all(
    modular: ModularMetaLearner, labelled: Support, capsys: pytest.CaptureFixture[str]
) -> None:
    _, card = explained(modular, labelled)
    found = json.loads(json.dumps(card["explanation"], allow_nan=False))
    assert found == card["explanation"]
    for table in explanation_tables(found):
        console().print(table)
    shown = capsys.readouterr().out
    page = render_markdown("my adapter.safetensors", card)
    assert "my%20adapter.png" in page
    for entry in found["units"]:
        assert entry["name"] in page
        assert entry["name"][:8] in shown
        assert f"{entry['effect']['loss']:+.4f}" in page
    assert "zero_shot" in shown
    picture = np.asarray(Image.open(io.BytesIO(explanation_picture(found))).convert("RGB"), dtype=int)
    higher = replace_effects(found, 2.0)
    assert min(picture.shape[:2]) > 400
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
    assert not np.array_equal(picture, np.asarray(Image.open(io.BytesIO(explanation_picture(higher))).convert("RGB")))


def replace_effects(found: dict[str, Any], loss: float) -> dict[str, Any]:
    first, *others = found["units"]
    return found | {"units": [first | {"effect": first["effect"] | {"loss": loss}}, *others]}


def test_nothing_adapted_has_no_effect(modular: ModularMetaLearner, labelled: Support) -> None:
    with torch.no_grad():
        adapted = modular.adapt(labelled)
    idle = replace(adapted, plan=adapted.plan.keeping(()))
    card = make_card(modular, labelled, idle, 0.1)
    found = explain(modular, labelled, idle, card["units"])
    assert all(entry["effect"] is None for entry in found["units"])
    assert card["backward"]["share"] == card["backward"]["macs_of_steps"] == 0
    assert explanation_picture(found)[:4] == b"\x89PNG"


def test_a_learner_without_a_policy_has_effects_and_no_indicators(
    modular: ModularMetaLearner, labelled: Support
) -> None:
    with torch.no_grad():
        adapted = modular.adapt(labelled)
    card = make_card(modular, labelled, adapted, 0.1)
    plain = MetaLearner.__new__(MetaLearner)
    plain.__dict__.update(modular.__dict__)
    found = explain(plain, labelled, adapted, card["units"])
    assert found["domain"] == []
    assert all(entry["effect"] is not None for entry in found["units"])
    assert len(explanation_tables(found)) == 1


@pytest.mark.parametrize("budget", [0.0, 0.3, 0.6, 1.0])
def test_the_card_reports_what_of_the_budget_was_taken(
    budget: float, modular: ModularMetaLearner, labelled: Support, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modular, "budget", budget)
    adapted, card = explained(modular, labelled)
    model, backward = modular.model, card["backward"]
    behind = model.backbone.macs(model.cut_before([u for u in model.active(adapted.plan.gate_of()) if u.learns]))
    whole = model.backbone.macs(model.cut_before([unit for unit in model.units if unit.learns]))
    assert backward["share"] == pytest.approx(behind / whole)
    assert backward["share"] <= budget
    assert backward["below_budget"] == pytest.approx(budget - behind / whole)
    assert backward["macs_of_steps"] == 2 * behind * len(labelled.images) * adapted.plan.steps
    assert backward["macs"] == backward["macs_of_steps"] + 2 * whole * len(labelled.images)  # and the indicators'
    assert f"{100 * backward['share']:.1f} % of steps on all learning units" in render_markdown("a.safetensors", card)
