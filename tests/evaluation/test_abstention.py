"""Thresholds of abstention: the lowest that do, and never on images that were adapted to."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modmeta.adaptation import Support
from modmeta.errors import ModmetaError
from modmeta.evaluation.abstention import calibrate_abstention, lowest_trusted, shipped_threshold
from modmeta.learners import ModularMetaLearner


@given(
    rows=st.lists(st.tuples(st.sampled_from([0.25, 0.5, 0.625, 0.875, 1.0]), st.booleans()), min_size=1, max_size=12),
    target=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)
def test_it_is_the_lowest_confidence_that_will_do(rows: list[tuple[float, bool]], target: float) -> None:
    confidences, hits = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = lowest_trusted(confidences.double(), hits, target)
    will_do = {}
    for confidence, _ in rows:
        kept = [hit for other, hit in rows if other >= confidence]
        if sum(kept) / len(kept) >= target:
            will_do[confidence] = (len(kept), sum(kept) / len(kept))
    if will_do:
        lowest = min(will_do)
        assert (found["threshold"], found["kept"]) == (lowest, will_do[lowest][0])
        assert found["accuracy"] == pytest.approx(will_do[lowest][1])
    else:
        assert found == {"threshold": 1.0, "images": len(rows), "kept": 0, "accuracy": None}


def test_images_are_predicted_by_adaptations_that_have_not_seen_them(
    modular: ModularMetaLearner, labelled: Support, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert labelled.labels is not None
    seen: list[list[int]] = []
    numbers = {bytes(image.numpy().tobytes()): index for index, image in enumerate(labelled.images)}
    adapt, logits = modular.adapt, modular.logits
    right: list[bool] = []

    def watched(part: Support) -> object:
        seen.append([numbers[image.numpy().tobytes()] for image in part.images])
        return adapt(part)

    def predicted(adapted: object, images: torch.Tensor) -> torch.Tensor:
        fold = [numbers[image.numpy().tobytes()] for image in images]
        assert not set(fold) & set(seen[-1])
        assert len(fold) + len(seen[-1]) == len(labelled.images)
        found = logits(adapted, images)  # type: ignore[arg-type]
        right.extend((found.argmax(1) == labelled.labels[fold]).tolist())  # type: ignore[index]
        return found

    monkeypatch.setattr(modular, "adapt", watched)
    monkeypatch.setattr(modular, "logits", predicted)
    with torch.no_grad():
        found = calibrate_abstention(modular, labelled, 0.0)
    assert (found["images"], found["kept"]) == (len(labelled.images), len(labelled.images))
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))


def test_supports_that_leave_nothing_to_hold_out(modular: ModularMetaLearner, labelled: Support) -> None:
    with pytest.raises(ModmetaError, match="needs labelled images"):
        calibrate_abstention(modular, replace(labelled, labels=None), 0.9)
    single = Support(labelled.images[:3], torch.arange(3), ("new", "unseen", "unknown"))
    with pytest.raises(ModmetaError, match="two images or more of every class"):
        calibrate_abstention(modular, single, 0.9)


@pytest.mark.parametrize("found", [{"threshold": 1.5}, {"threshold": "0.5"}, {"threshold": True}, {}, [0.5], 0.5])
def test_a_file_that_says_something_else(found: object) -> None:
    with pytest.raises(ModmetaError, match=r"no number in 0\.\.1"):
        shipped_threshold({"abstention": found})


def test_a_file_without_a_threshold() -> None:
    with pytest.raises(ModmetaError, match="holds no threshold; adapt with --abstain-target"):
        shipped_threshold({})
    assert shipped_threshold({"abstention": {"threshold": 0.25}}) == 0.25
