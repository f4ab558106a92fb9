"""Alignments in double precision against formulas, on batches with all, few or one domain, and in fits."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from traced import Traced, fit, same

from modmeta.data import SourceBatch
from modmeta.errors import ModmetaError
from modmeta.learners import ALIGNMENTS, AlignmentConfig, SourceConfig, load_learner
from modmeta.learners.alignment import Alignment, SourceOutputs
from modmeta.learners.alignment.mixup import partners

DIM, CLASSES, DOMAINS = 5, 4, 3
NAMES = ALIGNMENTS.names()


def build(name: str, **options: Any) -> Alignment:
    torch.manual_seed(0)
    return AlignmentConfig(name, options).build(DIM, DOMAINS).double()


def outputs(domains: list[int], smoothing: float = 0.0, seed: int = 0) -> SourceOutputs:
    generator = torch.Generator().manual_seed(seed)
    count = len(domains)
    features = torch.randn(count, DIM, generator=generator, dtype=torch.double).requires_grad_()
    weight = torch.randn(DIM, CLASSES, generator=generator, dtype=torch.double)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return SourceOutputs(features, features @ weight, labels, torch.tensor(domains), smoothing)


def twice(batch: SourceOutputs) -> SourceOutputs:
    """Return the same images as those of two domains."""
    count = len(batch.features)
    tensors = (torch.cat([each, each]) for each in (batch.features, batch.logits, batch.targets))
    return SourceOutputs(*tensors, torch.tensor([0] * count + [1] * count))


def penalty(name: str, batch: SourceOutputs, **options: Any) -> Tensor:
    """Return what an alignment at the end of its annealing adds to the mean risk."""
    return (build(name, **options)(batch, 1.0) - batch.risks.mean()).detach()


MIXED = outputs([0, 1, 2, 0, 1, 2, 2, 2, 1, 0, 1], smoothing=0.1)


# ---------------------------------------------------------------------- formulas


def test_coral_compares_means_and_covariances() -> None:
    gaps = []
    for a, b in combinations(range(3), 2):
        x, y = (MIXED.features.detach()[MIXED.domains == domain].numpy() for domain in (a, b))
        gaps.append(((x.mean(0) - y.mean(0)) ** 2).mean() + ((np.cov(x.T) - np.cov(y.T)) ** 2).mean())
    assert float(penalty("coral", MIXED, weight=0.7)) == pytest.approx(0.7 * np.mean(gaps), abs=1e-12)


def test_mmd_is_the_biased_estimate_with_a_sum_of_gaussians() -> None:
    def kernel(x: Tensor, y: Tensor) -> float:
        return sum(
            math.exp(-gamma * float((one - other).square().sum())) / (len(x) * len(y))
            for gamma in (0.1, 2.0)
            for one in x
            for other in y
        )

    groups = [MIXED.features.detach()[MIXED.domains == domain] for domain in range(3)]
    gaps = [kernel(x, x) + kernel(y, y) - 2 * kernel(x, y) for x, y in combinations(groups, 2)]
    assert float(penalty("mmd", MIXED, weight=2.0, gammas=[0.1, 2.0])) == pytest.approx(2 * np.mean(gaps), abs=1e-12)


def test_irm_is_the_squared_slope_in_a_dummy_factor() -> None:
    squares = []
    for domain in range(3):
        rows = MIXED.domains == domain
        factor = torch.ones((), dtype=torch.double, requires_grad=True)
        risk = F.cross_entropy(factor * MIXED.logits[rows].detach(), MIXED.targets[rows], label_smoothing=0.1)
        squares.append(float(torch.autograd.grad(risk, factor)[0]) ** 2)
    assert float(penalty("irm", MIXED)) == pytest.approx(100 * np.mean(squares), rel=1e-12)


def test_v_rex_is_the_variance_of_the_risks() -> None:
    rows = [MIXED.domains == domain for domain in range(3)]
    risks = [float(F.cross_entropy(MIXED.logits[r], MIXED.targets[r], label_smoothing=0.1)) for r in rows]
    assert float(penalty("vrex", MIXED)) == pytest.approx(10 * np.var(risks), rel=1e-10)


def test_group_dro_follows_its_update() -> None:
    alignment = build("group_dro", step=0.5)
    q = np.full(3, 1 / 3)
    for seed, domains in enumerate([[0, 1, 2, 1, 1], [0, 0, 1], [2, 2, 2]]):
        batch = outputs(domains, seed=seed)
        of = [batch.risks[batch.domains == domain] for domain in range(3)]
        risks = [float(own.mean()) if len(own) else 0.0 for own in of]
        q = q * np.exp(0.5 * np.array(risks))
        q /= q.sum()
        assert float(alignment(batch, 0.0)) == pytest.approx(float(q @ risks), rel=1e-12)
        np.testing.assert_allclose(alignment.weights.numpy(), q, rtol=1e-12)  # type: ignore[union-attr]


def test_group_dro_knows_all_processes_risks(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = outputs([0, 1, 1]), outputs([1, 2], seed=1)
    parts = [torch.cat([getattr(b, name) for b in (mine, other)]) for name in ("features", "logits", "targets")]
    whole = SourceOutputs(*parts, torch.tensor([0, 1, 1, 1, 2]))
    single = build("group_dro")
    expected = single(whole, 0.0)
    other_sums = torch.zeros(3).double().index_add(0, other.domains, other.risks.detach())
    answers = iter([other_sums, torch.tensor([0.0, 1.0, 1.0]).double()])
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(next(answers)))
    first = build("group_dro")
    found = first(mine, 0.0)
    answers = iter([torch.zeros(3).double().index_add(0, mine.domains, mine.risks.detach()),
                    torch.tensor([1.0, 2.0, 0.0]).double()])  # fmt: skip
    found = (found + build("group_dro")(other, 0.0)) / 2  # as DistributedDataParallel averages gradients
    torch.testing.assert_close(first.weights, single.weights)
    torch.testing.assert_close(found, expected)
    for part in (mine, other):
        ours, theirs = (torch.autograd.grad(f, part.features, retain_graph=True)[0] for f in (found, expected))
        torch.testing.assert_close(ours, theirs)


def test_dann_trains_its_classifier_and_turns_the_gradient_to_the_features() -> None:
    alignment = build("dann", weight=0.5)
    network = alignment.classifier  # type: ignore[union-attr]
    plain = F.cross_entropy(network(MIXED.features), MIXED.domains)
    size = 2 / (1 + math.exp(-10 * 0.2)) - 1
    adversarial = alignment(MIXED, 0.2) - MIXED.risks.mean()
    assert float(adversarial) == pytest.approx(0.5 * float(plain))
    parameters = list(network.parameters())
    for mine, own in zip(
        torch.autograd.grad(adversarial, [*parameters, MIXED.features], retain_graph=True),
        torch.autograd.grad(plain, [*parameters, MIXED.features]),
        strict=True,
    ):
        factor = -0.5 * size if mine.shape == MIXED.features.shape else 0.5
        torch.testing.assert_close(mine, factor * own)
    assert float(torch.autograd.grad(alignment(MIXED, 0.0) - MIXED.risks.mean(), MIXED.features)[0].abs().max()) < 1e-15


def test_mixup_stays_between_images_of_two_domains() -> None:
    random = np.random.default_rng(0)
    domains = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = SourceBatch(images, torch.arange(8), domains)
    for _ in range(5):
        mixed, shares = build("mixup", alpha=1.0).inputs(batch, 8, random)
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
        assert float(shares.diagonal().min()) >= 0.5  # every label is another one here, so shares name the images
        torch.testing.assert_close(mixed, torch.einsum("bi,ichw->bchw", shares, images / 255))
        second = shares.clone().fill_diagonal_(0).argmax(1)
        assert (domains[second] != domains).all()
        assert sorted(second.tolist()) == list(range(8))
    half = outputs([0, 1])
    soft = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.4, 0.6]], dtype=torch.double)
    risk = build("mixup")(SourceOutputs(half.features, half.logits, soft, half.domains), 0.0)
    torch.testing.assert_close(risk, -(soft * half.logits.log_softmax(1)).sum(1).mean())


def test_partners_are_of_another_domain_where_there_are_enough() -> None:
    for domains in ([0, 0, 0, 1], [2], [1, 1, 1], [0, 1], [3, 0, 0, 5, 5, 1]):
        others = partners(np.array(domains), np.random.default_rng(1))
        assert sorted(others) == list(range(len(domains)))
        largest = max(domains.count(domain) for domain in domains)
        same = sum(domains[i] == domains[j] for i, j in enumerate(others))
        assert same == (len(domains) if len(set(domains)) == 1 else max(0, 2 * largest - len(domains)))
        assert len(domains) == 1 or all(i != j for i, j in enumerate(others))


# ---------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("name", ["coral", "mmd", "vrex"])
def test_equal_domains_cost_nothing_and_different_ones_do(name: str) -> None:
    assert abs(float(penalty(name, twice(outputs([0, 0, 0, 0]))))) < 1e-14
    assert float(penalty(name, outputs([0, 0, 0, 1, 1, 1]))) > 1e-6


def test_equal_domains_of_a_calibrated_classifier_cost_irm_nothing() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.0, 0.3]], dtype=torch.double)
    calibrated = SourceOutputs(logits, logits, logits.softmax(1), torch.tensor([0]))
    assert float(penalty("irm", twice(calibrated))) < 1e-14


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("domains", [[0], [1, 1, 1], [0, 1], [0, 0, 0, 2]])
def test_few_domains_and_single_images_leave_everything_finite(name: str, domains: list[int]) -> None:
    batch = outputs(domains)
    loss = build(name)(batch, 1.0)
    (gradient,) = torch.autograd.grad(loss, batch.features)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    if name in ("coral", "mmd", "vrex") and len(set(domains)) == 1:
        assert float(loss) == float(batch.risks.mean())


def test_a_weight_is_annealed() -> None:
    alignment, risk = build("irm", weight=8.0, anneal=0.5), MIXED.risks.mean()
    early, late = (alignment(MIXED, progress) - risk for progress in (0.49, 0.5))
    torch.testing.assert_close(8 * early, late)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("corral", {}, "unknown alignment 'corral'.*coral"),
        ("coral", {"wait": 1}, "unknown option of alignment 'coral'.*weight"),
        ("irm", {"weight": -1.0}, "alignment.options.weight must be"),
        ("vrex", {"anneal": 2.0}, "alignment.options.anneal must lie in 0..1"),
        ("mmd", {"gammas": [1.0, 0.0]}, r"alignment.options.gammas\[1\] must be"),
        ("mixup", {"alpha": 0.0}, "alignment.options.alpha must be"),
        ("group_dro", {"step": math.nan}, "alignment.options.step must be"),
        ("dann", {"width": 0}, "alignment.options.width must be"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModmetaError, match=expected):
        build(name, **options)


# ---------------------------------------------------------------------- in a fit


def trained(folder: Path, name: str | None, **changes: Any) -> Traced:
    alignment = None if name is None else AlignmentConfig(name)
    learner = tiny.head_only(source=SourceConfig(epochs=3, alignment=alignment))
    return fit(folder, learner, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_is_changed_and_resumes_to_the_bit(name: str, tmp_path: Path, plain: Traced) -> None:
    whole = trained(tmp_path, name, keep=True)
    assert not same(whole.state, plain.state)
    (middle,) = (file for file in whole.files if file.stem == "step-3")
    assert trained(tmp_path, name, resume=middle).ends_like(whole)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return trained(tmp_path_factory.mktemp("plain"), None)


def test_a_checkpoint_remembers_its_alignment(tmp_path: Path) -> None:
    learner = tiny.head_only(source=SourceConfig(1, alignment=AlignmentConfig("mmd", {"gammas": [0.1]})))
    trainer = tiny.trainer(tmp_path, 2, limit_val_batches=0)
    trainer.fit(learner, datamodule=tiny.digits())
    trainer.save_checkpoint(tmp_path / "aligned.ckpt")
    again = load_learner(tmp_path / "aligned.ckpt")
    assert again.source == learner.source
    assert again.hparams["source"].alignment == AlignmentConfig("mmd", {"gammas": [0.1]})
