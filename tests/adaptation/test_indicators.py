"""Every indicator against a direct computation, and what may not change them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import (
    INDICATORS,
    IndicatorSet,
    Situation,
    SourceStatistics,
    backward_macs,
    backward_shares,
    early_shift,
    norm_sites,
    observe_norms,
    register_indicator,
    running_statistics,
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
    learners = [unit for unit in model.units if unit.learns]
    gradients, noise = (
        {unit.name: torch.randn(4, unit.cost.parameters, generator=generator) for unit in learners} for _ in "ab"
    )
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
        noise=noise,
        flipped=backbone(images.flip(3)),
        running=running_statistics(backbone, norm_sites(backbone)),
        shares=backward_shares(model),
        budget=0.3,
        image_size=32,
    )


@pytest.fixture
def s(make: Make) -> Situation:
    return situation_on(make("test_efficientnet", *CONFIGS))


def compute(name: str, s: Situation) -> Tensor:
    return INDICATORS.get(name).compute(s)


def test_task(s: Situation) -> None:
    torch.testing.assert_close(compute("task", s), torch.tensor([math.log(3), math.log(2), math.log(2), 1.0, 1.0]))
    uneven = replace(s, labels=torch.tensor([0, 0, 0, 0, 1, 2]))
    share = [4 / 6, 1 / 6, 1 / 6]
    evenness = -sum(p * math.log(p) for p in share) / math.log(3)
    torch.testing.assert_close(compute("task", uneven)[2:4], torch.tensor([0.0, evenness]))
    assert compute("task", replace(s, labels=None))[4] == 0.0


def test_what_may_be_spent_and_how_large_the_images_are(s: Situation) -> None:
    assert compute("budget", s).tolist() == [pytest.approx(math.log(0.3))]
    assert compute("budget", replace(s, budget=0.0)).tolist() == [pytest.approx(math.log(0.01))]
    assert compute("resolution", s).tolist() == [pytest.approx(math.log(32) - math.log(224))]


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2], [0, 0, 0, 2, 2, 2]])
def test_separation(labels: list[int], s: Situation) -> None:
    x = s.features.double()
    members = {c: [i for i, label in enumerate(labels) if label == c] for c in set(labels)}
    prototypes = {c: sum(x[i] for i in own) / len(own) for c, own in members.items()}
    ratios, between = [], 0.0
    for i, label in enumerate(labels):
        rest = [j for j in members[label] if j != i] or list(range(6))
        own = sum(x[j] for j in rest) / len(rest)
        nearest = min(float(((x[i] - p) ** 2).mean()) for c, p in prototypes.items() if c != label)
        ratios.append(math.log((nearest + 1e-6) / (float(((x[i] - own) ** 2).mean()) + 1e-6)))
        between += float(((prototypes[label] - x.mean(0)) ** 2).sum())
    expected = [sum(ratios) / 6, between / float(((x - x.mean(0)) ** 2).sum())]
    found = compute("separation", replace(s, labels=torch.tensor(labels)))
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_classes_that_lie_apart_are_separate(s: Situation) -> None:
    assert s.labels is not None
    ratio, between = compute("separation", replace(s, features=s.features + 50.0 * s.labels[:, None])).tolist()
    assert ratio > 3.0
    assert 0.99 < between <= 1.0
    for labels in (None, torch.zeros(6, dtype=torch.long)):
        assert compute("separation", replace(s, labels=labels)).tolist() == [0.0, 0.0]


def test_feature_shift(s: Situation) -> None:
    gaps = [float((((s.features.mean(0) - mean) ** 2) / s.sources.variance).mean()) - 1 / 6 for mean in s.sources.mean]
    gaps = [max(gap, 0.0) for gap in gaps]
    spread = float(((s.features - s.features.mean(0)) ** 2).mean(0).sum() / s.sources.variance.sum())
    values = torch.linalg.svdvals((s.features - s.features.mean(0)).double())
    share = [float(value / values.sum()) for value in values]
    rank = -sum(p * math.log(p) for p in share if p > 1e-6)
    expected = [math.log(value + 1e-3) for value in (min(gaps), sorted(gaps)[1], sum(gaps) / 3, spread)] + [rank]
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
    margin = sum(sorted(row)[-1] - sorted(row)[-2] for row in p.tolist()) / 6
    expected = torch.tensor([entropy, margin, float(F.cross_entropy(logits, s.labels)), hits, 1.0])
    torch.testing.assert_close(compute("zero_shot", s), expected, rtol=1e-4, atol=1e-5)
    unlabelled = compute("zero_shot", replace(s, labels=None))
    torch.testing.assert_close(unlabelled, torch.tensor([entropy, margin, 0.0, 0.0, 1.0]), rtol=1e-4, atol=1e-5)
    assert compute("zero_shot", replace(s, classes=("x", "y", "z"))).tolist() == [0.0] * 5


def test_consistency(s: Situation) -> None:
    assert s.flipped is not None

    def p(features: Tensor) -> Tensor:
        x = F.normalize(features - s.sources.mean.mean(0), dim=1)
        return (s.sources.scale * x @ s.sources.plain).softmax(1)

    one, other = p(s.features), p(s.flipped)
    divergence = float((one * (one.log() - other.log())).sum() / 6)
    change = float(((s.flipped - s.features) ** 2).mean() / ((s.features - s.features.mean(0)) ** 2).mean())
    found = compute("consistency", s)
    assert found.tolist() == pytest.approx([divergence, math.log(change + 1e-3)], rel=1e-3, abs=1e-5)
    assert divergence > 0
    same = compute("consistency", replace(s, flipped=s.features))
    assert same.tolist() == pytest.approx([0, math.log(1e-3)], abs=1e-4)
    new = compute("consistency", replace(s, classes=("x", "y", "z")))
    assert new.tolist() == [0.0, float(found[1])]


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


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_norm_drift(name: str, make: Make) -> None:
    configs = CONFIGS if name == "test_efficientnet" else CONFIGS[1:]
    s = situation_on(make(name, *configs))
    found = compute("norm_drift", s)
    if name == "test_vit":
        assert found.tolist() == [[0.0]] * len(s.units)
        return
    layers = dict(make(name, *configs).backbone.model.named_modules())
    logs, start = {}, 0
    for site in s.norm_sites:
        layer: Any = layers[site.name]
        part = slice(start, start := start + layer.num_features)
        mean = (s.norm_mean[part] - layer.running_mean) ** 2 / layer.running_var
        scale = (s.norm_variance[part].sqrt() / layer.running_var.sqrt() - 1) ** 2
        logs[site.name] = math.log(float((mean + scale).mean()) + 1e-3)
    for row, unit in zip(found, s.units, strict=True):
        blocks = [site.block for site in unit.sites]
        near = [n.name for n in s.norm_sites if min(blocks) <= n.block <= max(blocks)] or [s.norm_sites[-1].name]
        assert float(row) == pytest.approx(sum(logs[n] for n in near) / len(near), abs=1e-3)


def test_early_shift(make: Make) -> None:
    model = make("test_efficientnet", *CONFIGS)
    s = situation_on(model)
    layers = [layer for layer in model.backbone.model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    shifts, start = [], 0
    for layer in layers:
        part = slice(start, start := start + layer.num_features)
        mean = (s.norm_mean[part] - layer.running_mean) ** 2 / layer.running_var
        scale = (s.norm_variance[part].sqrt() / layer.running_var.sqrt() - 1) ** 2
        shifts.append(float((mean + scale).mean()))
    for share in (0.01, 0.2, 1.0):
        first = shifts[: max(1, round(share * len(shifts)))]
        assert early_shift(s, share) == pytest.approx(sum(first) / len(first), rel=1e-4)
    assert early_shift(replace(s, running=None)) is None
    assert early_shift(situation_on(make("test_vit", *CONFIGS[1:]))) is None


def by_unit(name: str, s: Situation, expected: Callable[[str], list[float]]) -> None:
    for row, unit in zip(compute(name, s), s.units, strict=True):
        if unit.learns:
            assert row.tolist() == pytest.approx(expected(unit.name), abs=1e-3)
        else:
            assert row.tolist() == [0.0] * len(row)


def rms(x: Tensor) -> float:
    return math.sqrt(sum(v * v for v in x.tolist()) / len(x))


def test_gradient(s: Situation) -> None:
    def expected(unit: str) -> list[float]:
        a, b, c, d = s.gradients[unit].double()
        one, other = a + c, b + d
        return [math.log(rms(one + other)), float(one @ other / one.norm() / other.norm())]

    by_unit("gradient", s, expected)


def test_noise_floor(s: Situation) -> None:
    by_unit("noise_floor", s, lambda unit: [math.log(rms(s.gradients[unit].sum(0)) / rms(s.noise[unit].sum(0)))])
    same = compute("noise_floor", replace(s, noise=s.gradients))
    assert torch.equal(same, torch.zeros_like(same))


def test_signal(s: Situation) -> None:
    def expected(unit: str) -> list[float]:
        estimates = [4 * row for row in s.gradients[unit].double()]  # of the whole gradient, by 6 / 4 images each
        mean = sum(estimates) / 4
        variance = sum(float(((e - mean) ** 2).mean()) for e in estimates) / 3 * 6 / 4
        power = float((mean**2).mean())
        return [math.log(power + variance), math.log(power / variance)]

    by_unit("signal", s, expected)


def test_signal_is_that_of_single_images_where_each_is_a_group(s: Situation) -> None:
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(2)).double()  # gradients of six images
    gradients = dict.fromkeys(s.gradients, rows / 6)
    fisher = float(rows.mean(0).square().mean() + rows.var(0).mean())
    gsnr = float(rows.mean(0).square().sum() / rows.var(0).sum())
    by_unit("signal", replace(s, gradients=gradients), lambda unit: [math.log(fisher), math.log(gsnr)])


def test_place(s: Situation, make: Make) -> None:
    model = make("test_efficientnet", *CONFIGS)
    learners = [unit for unit in model.units if unit.learns]
    for row, unit in zip(compute("place", s), s.units, strict=True):
        kinds = {site.kind for site in unit.sites}
        share = backward_macs(model, [unit], 1) / backward_macs(model, learners, 1)
        expected = [unit.depth, math.log(1 + unit.cost.parameters), share, float(unit.learns), float(unit.reads)]
        assert row.tolist() == pytest.approx(expected + [float(kind in kinds) for kind in KINDS])


def test_shares_fall_with_depth_and_count_what_lies_behind(make: Make) -> None:
    configs = (UnitConfig("norm_blend"), UnitConfig("film", group="site"), UnitConfig("projection"))
    model = make("test_efficientnet", *configs)
    shares = backward_shares(model)
    assert set(shares) == {unit.name for unit in model.units if unit.learns}
    film = [shares[unit.name] for unit in model.units if unit.name.startswith("film")]
    assert film == sorted(film, reverse=True)
    assert film[0] == 1.0
    assert shares["projection@features"] == 0.0
    # A layer behind the cut of a unit is one that runs after it; half a stage may be cut off with it.
    for unit in model.units:
        if unit.learns and unit.name != "projection@features":
            whole = sum(site.macs for site in model.backbone.sites if site.kind != "block")
            behind = sum(s.macs for s in model.backbone.sites if s.kind != "block" and s.order > unit.sites[0].order)
            assert shares[unit.name] >= behind / whole - 1e-9


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
        for situation in (other, replace(other, labels=None, held_out_loss=None, gradients={}, noise={})):
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
    unlabelled = replace(s, labels=None, held_out_loss=None, gradients={}, noise={})
    same = {n for n in INDICATORS.names() if torch.equal(compute(n, unlabelled), compute(n, s))}
    free = {"feature_shift", "posterior", "consistency", "norm_shift", "norm_drift", "place", "resolution", "budget"}
    assert same == free


# ---------------------------------------------------------------------- sets of indicators


def test_a_set_standardises_by_the_statistics_of_a_sample(s: Situation) -> None:
    chosen = IndicatorSet(["task", "difficulty", "place", "gradient"])
    assert (chosen.global_width, chosen.unit_width) == (6, 7 + len(KINDS))
    names = [("task", "log ways"), ("difficulty", "held-out loss"), ("place", "depth")]
    assert [chosen.numbers(False)[0], chosen.numbers(False)[5], chosen.numbers(True)[0]] == names
    assert (len(chosen.numbers(False)), len(chosen.numbers(True))) == (6, 7 + len(KINDS))
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


def test_what_is_costly_is_asked_for_only_by_what_reads_it() -> None:
    assert not IndicatorSet([n for n in INDICATORS.names() if not INDICATORS.get(n).needs]).needs
    assert IndicatorSet(["task", "gradient"]).needs == {"gradients"}
    assert IndicatorSet(["noise_floor", "consistency"]).needs == {"gradients", "noise", "flipped"}
    passes = {"task": 0, "norm_drift": 0, "consistency": 0, "gradient": 1, "signal": 1, "noise_floor": 2}
    assert {name: IndicatorSet([name]).backward_passes for name in passes} == passes
    assert IndicatorSet(["gradient", "signal", "noise_floor"]).backward_passes == 2


def test_dropout_and_noise_are_the_generators_and_of_training_alone(s: Situation) -> None:
    names = ["task", "feature_shift", "place"]
    clear = IndicatorSet(names)(s)
    blurred = IndicatorSet(names, dropout=0.3, noise=0.1)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = blurred(s, torch.Generator().manual_seed(seed))
        return found

    assert torch.equal(draw(1)[1], draw(1)[1])
    assert not torch.equal(draw(1)[1], draw(2)[1])
    draws = torch.stack([draw(seed)[0] for seed in range(400)])
    left_out = draws == 0.0
    assert float(left_out.float().mean()) == pytest.approx(0.3, abs=0.03)
    residual = (draws - clear[0])[~left_out]
    assert float(residual.std()) == pytest.approx(0.1, abs=0.01)
    each = draw(1)[1]
    assert bool(((each == 0).all(0) == (each == 0).any(0)).all())  # a number is left out for all units
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    for off in (blurred.eval()(s, generator), IndicatorSet(names)(s, generator), blurred.train()(s)):
        assert torch.equal(off[0], clear[0])
        assert torch.equal(off[1], clear[1])
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(ModmetaError, match=r"indicator_dropout must lie in 0\.\.1"):
        IndicatorSet(names, dropout=1.0)


def test_an_indicator_of_ones_own(s: Situation) -> None:
    @register_indicator("test_brightness", ("mean", "variance"), per_unit=False)
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
