"""Every indicator against a direct computation, and what may not change them."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import (
    INDICATORS,
    IndicatorSet,
    Situation,
    SourceStatistics,
    norm_sites,
    observe_norms,
    register_indicator,
)
from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.backbone import KINDS
from modmeta.errors import ModmetaError

Make = Callable[..., AdaptedBackbone]
CLASSES = ("a", "b", "c")
CONFIGS = (UnitConfig("norm_blend"), UnitConfig("film"), UnitConfig("lora", {"rank": 2}), UnitConfig("projection"))


def situation_on(model: AdaptedBackbone, domains: int = 3, counts: tuple[int, ...] = (2, 2, 2)) -> Situation:
    backbone, generator = model.backbone, torch.Generator().manual_seed(0)
    sources = SourceStatistics()
    data = [
        (f"d{k}", torch.rand(12, 3, 32, 32, generator=generator) * (0.3 + 0.2 * k), torch.arange(3).repeat(4))
        for k in range(domains)
    ]
    sources.measure(backbone, data, CLASSES)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.rand(len(labels), 3, 32, 32, generator=generator)
    features, mean, variance = observe_norms(backbone, images, norm_sites(backbone))
    gradients = {
        unit.name: torch.randn(2, unit.cost.parameters, generator=generator) for unit in model.units if unit.learns
    }
    return Situation(
        features=features,
        labels=labels,
        ways=len(counts),
        classes=CLASSES[: len(counts)],
        domain=None,
        norm_mean=mean,
        norm_variance=variance,
        norm_sites=norm_sites(backbone),
        sources=sources.view(None),
        distances=None,
        held_out_loss=torch.tensor(0.7),
        gradients=gradients,
        units=model.units,
    )


@pytest.fixture
def s(make: Make) -> Situation:
    return situation_on(make("test_efficientnet", *CONFIGS))


def compute(name: str, s: Situation) -> Tensor:
    return INDICATORS.get(name).compute(s)


def test_task(s: Situation) -> None:
    torch.testing.assert_close(compute("task", s), torch.tensor([math.log(3), math.log(2), 1.0, 1.0]))
    uneven = replace(s, labels=torch.tensor([0, 0, 0, 0, 1, 2]))
    share = [4 / 6, 1 / 6, 1 / 6]
    evenness = -sum(p * math.log(p) for p in share) / math.log(3)
    torch.testing.assert_close(compute("task", uneven)[2], torch.tensor(evenness))
    assert compute("task", replace(s, labels=None))[3] == 0.0


def test_feature_shift(s: Situation) -> None:
    gaps = [float((((s.features.mean(0) - mean) ** 2) / s.sources.variance).mean()) - 1 / 6 for mean in s.sources.mean]
    gaps = [max(gap, 0.0) for gap in gaps]
    spread = float(((s.features - s.features.mean(0)) ** 2).mean(0).sum() / s.sources.variance.sum())
    expected = [math.log(value + 1e-3) for value in (min(gaps), sum(gaps) / 3, spread)]
    torch.testing.assert_close(compute("feature_shift", s), torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_posterior(s: Situation) -> None:
    p = s.sources.posterior(s.features.mean(0), 6)
    entropy = -sum(float(q) * math.log(max(float(q), 1e-9)) for q in p) / math.log(4)
    expected = torch.tensor([float(p[:3].max()), float(p[3]), entropy])
    torch.testing.assert_close(compute("posterior", s), expected, rtol=1e-4, atol=1e-5)
    assert float(compute("posterior", replace(s, domain="d1"))[0]) > 0.95
    assert torch.equal(compute("posterior", replace(s, domain="elsewhere")), compute("posterior", s))


def test_zero_shot(s: Situation) -> None:
    assert s.labels is not None
    x = F.normalize(s.features - s.sources.mean.mean(0), dim=1)
    logits = s.sources.scale * x @ s.sources.plain
    p = logits.softmax(1)
    entropy = float(-(p * p.log()).sum(1).mean()) / math.log(3)
    hits = float((logits.argmax(1) == s.labels).float().mean())
    expected = torch.tensor([entropy, float(F.cross_entropy(logits, s.labels)), hits, 1.0])
    torch.testing.assert_close(compute("zero_shot", s), expected, rtol=1e-4, atol=1e-5)
    assert compute("zero_shot", replace(s, labels=None))[1:].tolist() == [0.0, 0.0, 1.0]
    assert compute("zero_shot", replace(s, classes=("x", "y", "z"))).tolist() == [0.0] * 4


def test_difficulty(s: Situation) -> None:
    assert compute("difficulty", s).tolist() == [pytest.approx(0.7)]
    assert compute("difficulty", replace(s, held_out_loss=None)).tolist() == [0.0]


def test_norm_shift(s: Situation) -> None:
    deviation = s.sources.norm_variance.mean(0).clamp_min(1e-6).sqrt()
    starts = [0]
    for site in s.norm_sites:
        starts.append(starts[-1] + site.shapes["weight"][0])
    rows = []
    for unit in s.units:
        blocks = {site.block for site in unit.sites}
        near = [k for k, n in enumerate(s.norm_sites) if min(blocks) <= n.block <= max(blocks)]
        if not near:
            near = [max(range(len(s.norm_sites)), key=lambda k: s.norm_sites[k].depth)]
            assert unit.sites[0].name == "features"
        by_source = []
        for k in range(3):
            logs = []
            for n in near:
                part = slice(starts[n], starts[n + 1])
                mean = (s.norm_mean[part] - s.sources.norm_mean[k, part]) / deviation[part]
                scale = (s.norm_variance[part].sqrt() - s.sources.norm_variance[k, part].sqrt()) / deviation[part]
                logs.append(float((mean.square() + scale.square()).mean() + 1e-3))
            by_source.append(sum(map(math.log, logs)) / len(logs))
        rows.append([sum(by_source) / 3, min(by_source)])
    torch.testing.assert_close(compute("norm_shift", s), torch.tensor(rows), rtol=1e-3, atol=1e-3)


def test_norm_shift_is_lowest_on_a_sources_own_statistics(s: Situation) -> None:
    same = replace(s, norm_mean=s.sources.norm_mean[1], norm_variance=s.sources.norm_variance[1])
    torch.testing.assert_close(compute("norm_shift", same)[:, 1], torch.full((len(s.units),), math.log(1e-3)))
    assert bool((compute("norm_shift", s)[:, 1] > math.log(1e-3)).all())


def test_gradient(s: Situation) -> None:
    found = compute("gradient", s)
    for row, unit in zip(found, s.units, strict=True):
        if not unit.learns:
            assert row.tolist() == [0.0, 0.0]
            continue
        one, other = s.gradients[unit.name].double()
        size = float(((one + other) / 2).square().mean().sqrt())
        cosine = float(one @ other / one.norm() / other.norm())
        assert row.tolist() == pytest.approx([math.log(size), cosine], abs=1e-4)


def test_place(s: Situation) -> None:
    for row, unit in zip(compute("place", s), s.units, strict=True):
        kinds = {site.kind for site in unit.sites}
        expected = [unit.depth, math.log(1 + unit.cost.parameters), float(unit.learns), float(unit.reads)]
        assert row.tolist() == pytest.approx(expected + [float(kind in kinds) for kind in KINDS])


@pytest.mark.parametrize(
    ("backbone", "domains", "counts", "configs"),
    [
        ("test_vit", 2, (1, 1), (UnitConfig("film", group="block"),)),
        ("test_convnext", 1, (3, 1, 2), (UnitConfig("projection"),)),
        ("test_resnet", 5, (2, 2), CONFIGS),
    ],
)
def test_widths_do_not_depend_on_units_domains_or_classes(
    backbone: str, domains: int, counts: tuple[int, ...], configs: tuple[UnitConfig, ...], make: Make
) -> None:
    other = situation_on(make(backbone, *configs), domains, counts)
    for name in INDICATORS.names():
        indicator = INDICATORS.get(name)
        rows = (len(other.units),) if indicator.per_unit else ()
        for situation in (other, replace(other, labels=None, held_out_loss=None, gradients={})):
            found = indicator.compute(situation)
            assert found.shape == (*rows, indicator.width), name
            assert bool(torch.isfinite(found).all()), name


def test_names_of_classes_do_not_matter(s: Situation) -> None:
    assert s.labels is not None
    order = torch.tensor([2, 0, 1])
    inverse = order.argsort()
    renamed = replace(s, labels=order[s.labels], classes=tuple(CLASSES[int(k)] for k in inverse))
    for name in INDICATORS.names():
        torch.testing.assert_close(compute(name, renamed), compute(name, s), msg=name)


def test_only_what_needs_labels_changes_without_them(s: Situation) -> None:
    unlabelled = replace(s, labels=None, held_out_loss=None, gradients={})
    same = {n for n in INDICATORS.names() if torch.equal(compute(n, unlabelled), compute(n, s))}
    assert same == {"feature_shift", "posterior", "norm_shift", "place"}


# ---------------------------------------------------------------------- sets of indicators


def test_a_set_standardises_by_the_statistics_of_a_sample(s: Situation) -> None:
    chosen = IndicatorSet(["task", "difficulty", "place", "gradient"])
    assert (chosen.global_width, chosen.unit_width) == (5, 6 + len(KINDS))
    sample = [replace(s, held_out_loss=torch.tensor(float(k))) for k in range(5)]
    rows = [chosen.raw(each) for each in sample]
    chosen.fit(rows)
    whole = torch.stack([chosen(each)[0] for each in sample])
    each = torch.cat([chosen(one)[1] for one in sample])
    for values, raw in ((whole, torch.stack([r[0] for r in rows])), (each, torch.cat([r[1] for r in rows]))):
        varied = raw.std(0, correction=0) > 1e-4
        assert bool(varied.any())
        assert not bool(varied.all())  # what never varied is centred and nothing more
        within = values.abs().amax(0) < 3.0
        torch.testing.assert_close(values.mean(0)[within], torch.zeros(int(within.sum())), atol=1e-5, rtol=0)
        found = values.std(0, correction=0)
        torch.testing.assert_close(found[varied & within], torch.ones(int((varied & within).sum())))
        assert bool((found[~varied] < 1e-3).all())
    far = chosen(replace(s, held_out_loss=torch.tensor(1e6)))[0]
    assert float(far.max()) == 3.0
    again = IndicatorSet(["task", "difficulty", "place", "gradient"])
    again.load_state_dict(chosen.state_dict())
    assert torch.equal(again(s)[1], chosen(s)[1])


def test_one_needs_gradients_only_if_an_indicator_does() -> None:
    assert IndicatorSet(["task", "gradient"]).needs_gradients
    assert not IndicatorSet(["task", "place"]).needs_gradients


def test_an_indicator_of_ones_own(s: Situation) -> None:
    @register_indicator("test_brightness", per_unit=False, width=2)
    def brightness(s: Situation) -> Tensor:
        return torch.stack([s.norm_mean[0], s.norm_variance[0]])

    try:
        whole, each = IndicatorSet(["test_brightness"])(s)
        assert whole.tolist() == pytest.approx([float(s.norm_mean[0]), float(s.norm_variance[0])])
        assert each.shape == (len(s.units), 0)
    finally:
        del INDICATORS._items["test_brightness"]
    with pytest.raises(ModmetaError, match="unknown indicator 'tsak'; did you mean 'task'"):
        IndicatorSet(["tsak"])
