"""Selectors."""

import pytest

from modmeta.backbone import KINDS, Selector
from modmeta.errors import ModmetaError


def test_selects_by_kind_stage_depth_and_name(get):
    sites = get("test_resnet").sites
    assert Selector().select(sites) == sites
    assert {site.kind for site in Selector(kinds=("norm", "conv")).select(sites)} == {"norm", "conv"}
    assert {site.stage for site in Selector(stages=(1,)).select(sites)} == {1}
    assert all(site.depth >= 0.5 for site in Selector(depth=(0.5, 1)).select(sites))
    assert [site.name for site in Selector(names=("*.0.bn1", "features")).select(sites)] == [
        "layer1.0.bn1",
        "layer2.0.bn1",
        "layer3.0.bn1",
        "layer4.0.bn1",
        "features",
    ]
    assert hash(Selector(kinds=["norm"])) == hash(Selector(kinds=("norm",)))


def test_says_what_there_is_when_nothing_matches(get):
    with pytest.raises(ModmetaError, match=r"norm \(\d+\).*stages 0, 1, 2, 3, 4"):
        Selector(kinds=("qkv",)).select(get("test_resnet").sites)


def test_refuses_what_cannot_match():
    with pytest.raises(ModmetaError, match="did you mean 'norm'"):
        Selector(kinds=("norms",))
    with pytest.raises(ModmetaError, match="depth"):
        Selector(depth=(0.7, 0.2))
    assert len(set(KINDS)) == 9
