from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modmeta.data.inspect import Inspection
from modmeta.data.screen import screen


def image(relative: str, pixels: str | None) -> Inspection:
    domain, class_name, _ = relative.split("/")
    bad = pixels is None
    return Inspection(
        relative, domain, class_name, 1, "quarantined" if bad else "ok", "is empty" if bad else None, (),
        8, 8, "L", pixels, pixels, None if bad else 0,
    )  # fmt: skip


def test_without_oddities_everything_is_kept() -> None:
    images = [image("a/cat/0", "p"), image("a/cat/1", "q"), image("a/dog/0", "r")]
    found = screen(images)
    assert found.kept == (0, 1, 2)
    assert found.quarantined == found.copies == found.shared == ()


@pytest.mark.fault(15)
def test_one_of_several_copies_is_kept() -> None:
    found = screen([image("a/cat/0", "p"), image("a/cat/1", "q"), image("a/cat/2", "p"), image("a/cat/3", "p")])
    assert found.kept == (0, 1)
    assert found.copies == (("a/cat/2", "a/cat/0"), ("a/cat/3", "a/cat/0"))
    assert found.quarantined == ()


@pytest.mark.fault(15)
def test_the_same_pixels_under_two_labels_quarantine_all_of_them() -> None:
    images = [image("a/cat/0", "p"), image("a/cat/1", "p"), image("a/dog/0", "p"), image("a/dog/1", "q")]
    found = screen(images)
    assert found.kept == (3,)
    assert {one.relative: one.reason for one in found.quarantined} == {
        "a/cat/0": "has the same pixels as a/dog/0, which has another label",
        "a/cat/1": "has the same pixels as a/dog/0, which has another label",
        "a/dog/0": "has the same pixels as a/cat/0, which has another label",
    }
    assert found.copies == ()


def test_bad_images_are_no_copies_of_each_other() -> None:
    images = [image("a/cat/0", None), image("a/dog/0", None), image("a/dog/1", "p")]
    found = screen(images)
    assert found.kept == (2,)
    assert found.quarantined == tuple(images[:2])


def test_images_of_two_domains_are_kept_and_told() -> None:
    found = screen([image("a/cat/0", "p"), image("b/dog/0", "p"), image("c/cat/0", "p")])
    assert found.kept == (0, 1, 2)
    assert found.shared == (("b/dog/0", "a/cat/0"), ("c/cat/0", "a/cat/0"))


cells = st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from(["p", "q", "r", "s", None]))


@pytest.mark.fault(15)
@given(drawn=st.lists(cells, max_size=30))
def test_what_is_kept_is_unambiguous(drawn: list[tuple[str, str, str | None]]) -> None:
    images = [image(f"{domain}/{name}/{i}", pixels) for i, (domain, name, pixels) in enumerate(drawn)]
    found = screen(images)
    kept = [images[place] for place in found.kept]
    assert len({(one.domain, one.pixels_sha256) for one in kept}) == len(kept)
    named = [one.relative for one in found.quarantined] + [copy for copy, _ in found.copies]
    assert sorted(named + [one.relative for one in kept]) == sorted(one.relative for one in images)
    for one in found.quarantined:
        original = images[int(one.relative.split("/")[2])]
        assert replace(one, verdict=original.verdict, reason=original.reason) == original
        rivals = {i.class_name for i in images if (i.domain, i.pixels_sha256) == (one.domain, one.pixels_sha256)}
        assert original.verdict == "quarantined" or len(rivals) > 1
