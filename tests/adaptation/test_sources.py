"""What is remembered of the sources: statistics, classifiers without a domain, and the domain posterior."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation import SourceStatistics, SourceView, norm_sites, observe_norms
from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError

DOMAINS, CLASSES = ("art", "photo", "sketch"), ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone("test_efficientnet", pretrained=False, image_size=32)


def batches(domains: Sequence[str] = DOMAINS, chunk: int = 24) -> list[tuple[str, Tensor, Tensor]]:
    """Return images whose brightness and contrast say the domain, and whose pattern says the class."""
    found = []
    for domain in domains:
        generator = torch.Generator().manual_seed(len(domain))
        labels = torch.arange(3).repeat(8)
        rows = torch.linspace(0, 6.28, 32)
        pattern = torch.sin(rows[None] * (labels[:, None] + 1)).view(24, 1, 32, 1).expand(24, 3, 32, 32)
        images = 0.1 * len(domain) + 0.15 * pattern + 0.1 * torch.rand(24, 3, 32, 32, generator=generator)
        found += [(domain, *part) for part in zip(images.split(chunk), labels.split(chunk), strict=True)]
    return found


def measured(backbone: Backbone, domains: Sequence[str] = DOMAINS, chunk: int = 24) -> SourceStatistics:
    sources = SourceStatistics()
    sources.measure(backbone, batches(domains, chunk), CLASSES)
    return sources


@pytest.fixture(scope="module")
def sources(backbone: Backbone) -> SourceStatistics:
    return measured(backbone)


def test_statistics_are_those_of_all_images(backbone: Backbone, sources: SourceStatistics) -> None:
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        features = [backbone.model(backbone.prepare(images)) for _, images, _ in batches()]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(sources.mean, torch.stack([x.mean(0) for x in features]), rtol=1e-4, atol=1e-6)
    for k in range(3):
        pixels = [inputs[site.name][k].transpose(0, 1).flatten(1) for site in norm_sites(backbone)]
        torch.testing.assert_close(sources.norm_mean[k], torch.cat([p.mean(1) for p in pixels]), rtol=1e-3, atol=1e-5)
        expected = torch.cat([p.var(1, correction=0) for p in pixels])
        torch.testing.assert_close(sources.norm_variance[k], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_efficientnet_gn"])
def test_norm_statistics_are_per_channel_whatever_the_layout(name: str) -> None:
    backbone = Backbone(name, pretrained=False, image_size=32)
    sites = norm_sites(backbone)
    images = torch.rand(4, 3, 32, 32)
    inputs: dict[str, Tensor] = {}
    for site in sites:
        backbone.model.get_submodule(site.name).register_forward_pre_hook(
            lambda _, args, name=site.name: inputs.__setitem__(name, args[0])
        )
    with torch.no_grad():
        backbone.model(backbone.prepare(images))
    features, mean, variance = observe_norms(backbone, images, sites)
    assert torch.equal(features, backbone(images))
    flat = [inputs[s.name].movedim(s.channel_dim % inputs[s.name].ndim, 0).flatten(1) for s in sites]
    assert len(mean) == sum(site.shapes["weight"][0] for site in sites)
    torch.testing.assert_close(mean, torch.cat([x.mean(1) for x in flat]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, torch.cat([x.var(1, correction=0) for x in flat]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunks_are_pooled_exactly(chunk: int, backbone: Backbone, sources: SourceStatistics) -> None:
    parts = measured(backbone, chunk=chunk)
    for name in ("mean", "variance", "norm_mean", "norm_variance", "scale"):
        torch.testing.assert_close(getattr(parts, name), getattr(sources, name), rtol=1e-3, atol=2e-4, msg=name)
    # Features of an untrained backbone differ by 0.002, so what a batch size rounds off grows in the classifiers.
    for name in ("aligned", "plain"):
        torch.testing.assert_close(getattr(parts, name), getattr(sources, name), rtol=1e-2, atol=3e-3, msg=name)


def test_a_view_is_what_would_be_known_without_the_domain(backbone: Backbone, sources: SourceStatistics) -> None:
    for hidden in DOMAINS:
        others = tuple(domain for domain in DOMAINS if domain != hidden)
        view = sources.view(hidden)
        alone = measured(backbone, others)
        assert view.domains == others
        for name in ("mean", "norm_mean", "norm_variance"):
            torch.testing.assert_close(getattr(view, name), getattr(alone, name))
        torch.testing.assert_close(view.variance, alone.variance.mean(0).clamp_min(1e-8))
        # Moving the hidden domain's images moves nothing that the view shows of them.
        spoiled = SourceStatistics()
        noise = torch.Generator().manual_seed(0)
        spoiled.measure(
            backbone,
            [(d, torch.rand(x.shape, generator=noise) if d == hidden else x, y) for d, x, y in batches()],
            CLASSES,
        )
        torch.testing.assert_close(spoiled.view(hidden).mean, view.mean)
        torch.testing.assert_close(spoiled.view(hidden).typical, view.typical)
    assert sources.view(None).domains == sources.view("unheard of").domains == DOMAINS
    assert measured(backbone, ("art",)).view("art").domains == ("art",)  # nothing else to start from


def test_leave_one_out_classifiers_are_refits_without_the_domain(
    backbone: Backbone, sources: SourceStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One strength for all, as its choice looks at every domain.
    monkeypatch.setattr("modmeta.adaptation.sources._RIDGES", (0.01,))
    fixed = measured(backbone)
    data = {domain: (backbone(images), labels) for domain, images, labels in batches()}
    center = torch.stack([x.mean(0) for x, _ in data.values()]).mean(0)
    for hidden in (None, *DOMAINS):
        used = [pair for domain, pair in data.items() if domain != hidden]
        for found, centers in (
            (fixed.view(hidden).aligned, [x.mean(0) for x, _ in used]),
            (fixed.view(hidden).plain, [center] * len(used)),
        ):
            # The normal equations of the mean over domains of each domain's mean squared error.
            x = torch.cat([F.normalize(x - c, dim=1) for (x, _), c in zip(used, centers, strict=True)]).double()
            y = torch.cat([F.one_hot(y, 3) - 1 / 3 for _, y in used]).double()
            root = (len(x) * 0.01) ** 0.5 * torch.eye(x.shape[1], dtype=torch.double)
            stacked = torch.linalg.lstsq(torch.cat([x, root]), torch.cat([y, 0 * root[:, :3]])).solution
            torch.testing.assert_close(found, stacked.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.fault(12, 14)
def test_the_anchor_knows_its_classes_and_no_others(sources: SourceStatistics) -> None:
    view = sources.view(None)
    anchor = view.anchor(("emu", "yak", "cat"))
    assert anchor.known.tolist() == [True, False, True]
    assert torch.equal(anchor.weight[:, 0], view.aligned[:, 2])
    assert not bool(anchor.weight[:, 1].any())
    assert torch.equal(anchor.weight[:, 2], view.aligned[:, 0])


def test_the_sources_classifier_tells_classes_of_a_domain_it_was_not_fitted_on(
    backbone: Backbone, sources: SourceStatistics
) -> None:
    for domain, images, labels in batches():
        x = backbone(images)
        view = sources.view(domain)
        aligned = view.anchor(CLASSES).classifier(view.scale, x.mean(0))
        assert float((aligned(x).argmax(1) == labels).float().mean()) > 0.8


# ---------------------------------------------------------------------- the posterior


def view_of(mean: Tensor) -> SourceView:
    count, width = mean.shape
    names = tuple(f"d{k}" for k in range(count))
    zeros = torch.zeros(count, 0)
    weights = torch.zeros(width, 1)
    gaps = (mean[:, None] - mean[None]).square().mean(-1)
    typical = gaps.sum() / (count * (count - 1))
    return SourceView(names, ("c",), mean, torch.ones(width), typical, zeros, zeros, weights, weights, torch.ones(()))


def test_the_posterior_is_a_distribution_that_names_the_nearest_domain() -> None:
    mean = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    view = view_of(mean)
    for k in range(3):
        p = view.posterior(mean[k], 1000)
        assert p.shape == (4,)
        assert float(p.sum()) == pytest.approx(1.0)
        assert int(p.argmax()) == k
        assert float(p.min()) >= 0
    unknown = [float(view.posterior(torch.tensor([-far, -far]), 1000)[-1]) for far in (0.0, 1.0, 2.0, 4.0, 8.0)]
    assert unknown == sorted(unknown)
    assert unknown[0] < 0.1
    assert unknown[-1] > 0.9


def test_an_explicit_label_sharpens_the_posterior() -> None:
    view = view_of(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]))
    mean = torch.tensor([1.5, 1.5])
    plain = view.posterior(mean, 5)
    for k, label in enumerate(view.domains):
        p = view.posterior(mean, 5, label)
        assert float(p[k]) > 0.95
        assert float(p.sum()) == pytest.approx(1.0)
    assert torch.equal(view.posterior(mean, 5, "no source"), plain)
    assert torch.equal(view.posterior(mean, 5, None), plain)


def test_distances_do_not_grow_with_sampling_noise() -> None:
    view = view_of(torch.zeros(2, 400) + torch.tensor([[0.0], [2.0]]))
    generator = torch.Generator().manual_seed(0)
    for count in (1, 5, 50):
        draws = torch.randn(60, count, 400, generator=generator).mean(1)
        found = torch.stack([view.distances(draw, count) for draw in draws]).mean(0)
        torch.testing.assert_close(found, torch.tensor([0.0, 4.0]), rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------- keeping and refusing


def test_a_state_dict_brings_the_sources_back(sources: SourceStatistics) -> None:
    again = SourceStatistics()
    assert not again.ready
    again.load_state_dict(sources.state_dict())
    assert again.ready
    assert (again.domains, again.classes) == (sources.domains, sources.classes)
    for hidden in (None, "art"):
        a, b = vars(sources.view(hidden)), vars(again.view(hidden))
        assert all(torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name] for name in a)


def test_features_that_are_not_finite_are_refused_by_domain(backbone: Backbone) -> None:
    bad = [(d, x * (float("nan") if d == "photo" else 1.0), y) for d, x, y in batches()]
    with pytest.raises(ModmetaError, match="not finite on domain 'photo'"):
        SourceStatistics().measure(backbone, bad, CLASSES)
