"""Closed-form heads against plain loops, refits and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import HEADS, Anchor, AnchoredRidgeHead, Head, Labelled, RidgeHead
from modmeta.errors import ModmetaError

NAMES = ("prototype", "cosine", "ridge", "anchored_ridge", "mahalanobis")
WARY = "anchored_ridge, wary of labels"
NOISE = 0.2
shapes = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(1, 5), min_size=2, max_size=5),
        "width": st.integers(2, 12),
        "seed": st.integers(0, 999),
    }
)


def head(name: str, scale: float = 3.0, ridge: float = 0.4) -> Head:
    made = (AnchoredRidgeHead(label_noise=NOISE) if name == WARY else HEADS.get(name)()).double()
    with torch.no_grad():  # in double from the start, as the oracles are
        made.log_scale.fill_(math.log(scale))
        made.log_ridge.fill_(math.log(ridge))
    return made


def support(counts: list[int], width: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Return features, labels in random order, and the number of classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    features = 2 + torch.randn(len(labels), width, generator=generator, dtype=torch.double) + labels[:, None]
    return features, labels, len(counts)


def query(width: int) -> Tensor:
    return 2 + 3 * torch.randn(7, width, generator=torch.Generator().manual_seed(7), dtype=torch.double)


def balanced_center(x: Tensor, y: Tensor, ways: int) -> Tensor:
    return torch.stack([x[y == c].mean(0) for c in range(ways)]).mean(0)


@settings(max_examples=40, deadline=None)
@given(shape=shapes)
def test_prototype_is_the_squared_distance_to_class_means(shape: dict) -> None:
    x, y, ways = support(**shape)
    q = query(shape["width"])
    spread = torch.stack([((row - x.mean(0)) ** 2).sum() for row in x]).mean()
    expected = torch.stack([-3 * ((q - x[y == c].mean(0)) ** 2).sum(1) / spread for c in range(ways)], dim=1)
    found = head("prototype").fit(x, y, ways)(q)
    # Equal up to a constant per row, which no probability depends on.
    torch.testing.assert_close(found - found.mean(1, keepdim=True), expected - expected.mean(1, keepdim=True))


@settings(max_examples=40, deadline=None)
@given(shape=shapes)
def test_cosine_is_the_angle_to_the_class_means_of_centred_features(shape: dict) -> None:
    x, y, ways = support(**shape)
    q = query(shape["width"])
    center = balanced_center(x, y, ways)
    unit = F.normalize(x - center, dim=1)
    means = [unit[y == c].mean(0) for c in range(ways)]
    expected = torch.stack([3 * F.cosine_similarity(q - center, mean[None], dim=1) for mean in means], dim=1)
    torch.testing.assert_close(head("cosine").fit(x, y, ways)(q), expected)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, factor=st.sampled_from([0.5, 1.0, 4.0]))
def test_ridge_is_scikit_learns_with_every_class_weighing_the_same(shape: dict, factor: float) -> None:
    x, y, ways = support(**shape)
    q = query(shape["width"])
    center = balanced_center(x, y, ways)
    unit = F.normalize(x - center, dim=1)
    targets = F.one_hot(y, ways).double() - 1 / ways
    counts = torch.bincount(y).double()
    sample_weight = len(y) / (counts[y] * ways)  # the same total for every class
    model = Ridge(alpha=0.4 * factor, fit_intercept=False, solver="cholesky")
    model.fit(unit.numpy(), targets.numpy(), sample_weight=sample_weight.numpy())
    expected = 3 * torch.from_numpy(np.asarray(model.predict(F.normalize(q - center, dim=1).numpy())))
    for name in ("ridge", "anchored_ridge"):
        found = head(name).fit(x, y, ways, None, torch.tensor(factor, dtype=torch.double))(q)
        torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(shape=shapes)
def test_anchored_ridge_is_ridge_on_what_the_anchor_leaves(shape: dict) -> None:
    x, y, ways = support(**shape)
    q = query(shape["width"])
    known = torch.ones(ways, dtype=torch.bool)
    width = shape["width"]
    nothing = Anchor(x.new_zeros(width, ways), known, x.new_zeros(width))
    zero = head("anchored_ridge").fit(x, y, ways, nothing)
    plain = head("ridge").fit(x, y, ways)
    torch.testing.assert_close(zero(q), plain(q))
    torch.testing.assert_close(head("anchored_ridge").held_out(x, y, ways, nothing), head("ridge").held_out(x, y, ways))
    # Primal form: argmin_W sum_i b_i |x_i W - y_i|^2 + lambda |W - W0|^2.
    start = torch.randn(width, ways, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    unit = F.normalize(x - balanced_center(x, y, ways), dim=1)
    targets = F.one_hot(y, ways).double() - 1 / ways
    weight = len(y) / (torch.bincount(y).double()[y] * ways)
    gram = unit.T @ (weight[:, None] * unit) + 0.4 * torch.eye(width, dtype=torch.double)
    expected = torch.linalg.solve(gram, unit.T @ (weight[:, None] * targets) + 0.4 * start)
    fitted = head("anchored_ridge").fit(x, y, ways, Anchor(start, known, x.new_zeros(width)))
    torch.testing.assert_close(fitted.weight, expected)
    # The stronger the ridge, the nearer to the anchor.
    bound = head("anchored_ridge").fit(
        x, y, ways, Anchor(start, known, x.new_zeros(width)), torch.tensor(1e9, dtype=torch.double)
    )
    torch.testing.assert_close(bound.weight, start, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, anchored=st.booleans())
def test_ridge_held_out_is_a_refit_without_each_image(shape: dict, anchored: bool) -> None:
    x, y, ways = support(**shape)
    width = shape["width"]
    start = torch.randn(width, ways, generator=torch.Generator().manual_seed(1), dtype=torch.double) * anchored
    anchor = Anchor(start, torch.ones(ways, dtype=torch.bool), x.new_zeros(width))
    unit = F.normalize(x - balanced_center(x, y, ways), dim=1)  # the centre is that of the whole support
    targets = F.one_hot(y, ways).double() - 1 / ways
    weight = len(y) / (torch.bincount(y).double()[y] * ways)
    rows = []
    for i in range(len(y)):
        rest = torch.arange(len(y)) != i
        a, b, w = unit[rest], targets[rest], weight[rest][:, None]
        gram = a.T @ (w * a) + 0.4 * torch.eye(width, dtype=torch.double)
        rows.append(3 * unit[i] @ torch.linalg.solve(gram, a.T @ (w * b) + 0.4 * start))
    found = head("anchored_ridge").held_out(x, y, ways, anchor)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(shape=shapes)
def test_means_held_out_leave_each_image_out_of_its_own_class(shape: dict) -> None:
    x, y, ways = support(**shape)
    spread = ((x - x.mean(0)) ** 2).sum(1).mean()
    unit = F.normalize(x - balanced_center(x, y, ways), dim=1)
    prototype, cosine = torch.zeros(len(y), ways).double(), torch.zeros(len(y), ways).double()
    for i in range(len(y)):
        for c in range(ways):
            members = [j for j in range(len(y)) if int(y[j]) == c and j != i]
            members = members or [i]  # a class of one image keeps it
            prototype[i, c] = -3 * ((x[i] - x[members].mean(0)) ** 2).sum() / spread
            cosine[i, c] = 3 * F.cosine_similarity(unit[i], unit[members].mean(0), dim=0)
    torch.testing.assert_close(head("prototype").held_out(x, y, ways), prototype)
    torch.testing.assert_close(head("cosine").held_out(x, y, ways), cosine, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Only one sample")
@settings(max_examples=40, deadline=None)
@given(shape=shapes, factor=st.sampled_from([0.5, 1.0, 4.0]))
def test_mahalanobis_is_scikit_learns_discriminant_analysis(shape: dict, factor: float) -> None:
    x, y, ways = support(**shape)
    q, width = query(shape["width"]), shape["width"]
    within = sum(((x[y == c] - x[y == c].mean(0)) ** 2).sum() for c in range(ways)) / len(x) / width
    added = 0.4 * factor * ((x - x.mean(0)) ** 2).sum() / len(x) / width
    ridge = torch.tensor(factor, dtype=torch.double)
    found = head("mahalanobis").fit(x, y, ways, None, ridge)(q) / 3
    if within > 0:
        # Its covariance is (1 - s) W + s tr(W) / D, ours W + l tr(T) / D: the same up to a factor.
        shrinkage = float(added / (added + within))
        counts = torch.bincount(y)  # it pools by the priors, so these must be the shares of the classes
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=(counts / len(y)).numpy())
        model.fit(x.numpy(), y.numpy())
        scores = torch.from_numpy(q.numpy() @ model.coef_.T + model.intercept_)
        if ways == 2:  # it gives the difference of the two
            scores = torch.cat([torch.zeros(len(q), 1), scores.reshape(-1, 1)], dim=1)
            prior = (counts[1] / counts[0]).log() * torch.tensor([0.0, 1.0])
        else:
            prior = (counts / len(y)).log()
        expected = 2 * (1 - shrinkage) * (scores - prior) / width
    else:
        expected = head("prototype").fit(x, y, ways)(q) / 3 / (0.4 * factor)
    center = expected.mean(1, keepdim=True)
    torch.testing.assert_close(found - found.mean(1, keepdim=True), expected - center, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(shape=shapes)
def test_mahalanobis_held_out_is_a_refit_without_each_image(shape: dict) -> None:
    x, y, ways = support(**shape)
    width = shape["width"]
    ridge = 0.4 * ((x - x.mean(0)) ** 2).sum() / len(x)  # the yardstick is that of the whole support
    rows = []
    for i in range(len(y)):
        means, scatter = [], torch.zeros(width, width, dtype=torch.double)
        for c in range(ways):
            members = [j for j in range(len(y)) if int(y[j]) == c and j != i] or [i]  # a class of one image keeps it
            means.append(x[members].mean(0))
            scatter += (x[members] - means[-1]).T @ (x[members] - means[-1])
        covariance = width * scatter / (len(y) - 1) + ridge * torch.eye(width, dtype=torch.double)
        rows.append(torch.stack([-3 * (x[i] - m) @ torch.linalg.solve(covariance, x[i] - m) for m in means]))
    found = head("mahalanobis").held_out(x, y, ways)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_to_features_and_to_the_heads_own_numbers(name: str) -> None:
    x, y, ways = support([2, 3, 1], 4, 0)
    q = query(4)
    anchor = Anchor(torch.randn(4, 3, dtype=torch.double), torch.tensor([True, True, False]), x.mean(0))
    x.requires_grad_()
    ridge = torch.tensor(1.3, dtype=torch.double, requires_grad=True)
    scale = torch.tensor(0.3, dtype=torch.double, requires_grad=True)

    def fit(x: Tensor, ridge: Tensor, scale: Tensor) -> Tensor:
        tensors = {"log_scale": scale, "log_ridge": -scale}
        return torch.func.functional_call(Fit(name), tensors, (x, y, ways, anchor, ridge, q))

    assert torch.autograd.gradcheck(fit, (x, ridge, scale))
    assert torch.autograd.gradgradcheck(fit, (x, ridge, scale))


class Fit(torch.nn.Module):
    """A head's two verbs as one forward, to call with other parameters."""

    def __init__(self, name: str) -> None:
        super().__init__()
        inner = head(name)
        self.log_scale, self.log_ridge = inner.log_scale, inner.log_ridge
        self.inner = [inner]

    def forward(self, x: Tensor, y: Tensor, ways: int, anchor: Anchor, ridge: Tensor, q: Tensor) -> Tensor:
        (inner,) = self.inner
        del inner.log_scale, inner.log_ridge
        inner.log_scale, inner.log_ridge = self.log_scale, self.log_ridge  # type: ignore[assignment]
        return torch.cat([inner.fit(x, y, ways, anchor, ridge)(q), inner.held_out(x, y, ways, anchor, ridge)])


@settings(max_examples=25, deadline=None)
@given(shape=shapes, anchored=st.booleans())
def test_a_wary_ridge_weighs_every_image_by_how_likely_its_label_is_right(shape: dict, anchored: bool) -> None:
    x, y, ways = support(**shape)
    width = shape["width"]
    start = torch.randn(width, ways, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    known = torch.arange(ways) > 0
    anchor = Anchor(start * known, known, x.new_zeros(width)) if anchored else None
    wary = head(WARY)
    trust = []
    for p, label in zip(wary.held_out(x, y, ways, anchor).softmax(1).tolist(), y.tolist(), strict=True):
        # Bayes: the label is right, or was drawn from the other classes.
        right, wrong = (1 - NOISE) * p[label], NOISE * (1 - p[label]) / (ways - 1)
        alone = int((y == label).sum()) == 1 and not (anchored and label > 0)
        trust.append(1.0 if alone else max(right / (right + wrong), 1e-3))
    unit = F.normalize(x - balanced_center(x, y, ways), dim=1)
    targets = F.one_hot(y, ways).double() - 1 / ways
    weight = (len(y) / (torch.bincount(y).double()[y] * ways) * torch.tensor(trust, dtype=torch.double))[:, None]
    gram = unit.T @ (weight * unit) + 0.4 * torch.eye(width, dtype=torch.double)
    origin = torch.zeros_like(start) if anchor is None else anchor.weight
    expected = torch.linalg.solve(gram, unit.T @ (weight * targets) + 0.4 * origin)
    torch.testing.assert_close(wary.fit(x, y, ways, anchor).weight, expected, rtol=1e-6, atol=1e-8)


def test_a_wrong_label_is_trusted_least_and_costs_a_wary_head_less() -> None:
    x, y, ways = support([8, 8, 8], 12, 5)
    x = x + 3 * F.one_hot(y, 12)  # classes apart
    given = y.clone()
    given[4] = (y[4] + 1) % ways
    wary, plain = RidgeHead(10.0, 0.4, label_noise=NOISE).double(), RidgeHead(10.0, 0.4).double()
    assert int(wary.trust(Labelled(x, given, ways, None, None)).argmin()) == 4
    on_truth = [F.cross_entropy(each.fit(x, given, ways)(x[4:5]), y[4:5]) for each in (wary, plain)]
    assert on_truth[0] < on_truth[1]


def test_doubt_is_the_posterior_of_labels_some_of_which_are_wrong() -> None:
    logits = torch.randn(6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    true = torch.arange(4)
    for row, label in enumerate(labels):
        said = torch.where(true == label, 1 - NOISE, NOISE / 3)  # how likely what is said is, by what is
        joint = logits[row].softmax(0) * said
        found = head(WARY).doubt(logits, labels)[row]
        torch.testing.assert_close(found, 1 - joint[label] / joint.sum())
    assert not head("anchored_ridge").doubt(logits, labels).any()


def test_the_loss_of_a_wary_head_is_the_likelihood_of_labels_some_of_which_are_wrong() -> None:
    logits = torch.randn(6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    mixing = torch.full((4, 4), NOISE / 3, dtype=torch.double).fill_diagonal_(1 - NOISE)  # of what is, what is said
    expected = F.nll_loss((logits.softmax(1) @ mixing).log(), labels, reduction="none")
    torch.testing.assert_close(head(WARY).support_loss(logits, labels), expected)
    plain = F.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(head("anchored_ridge").support_loss(logits, labels), plain)


@pytest.mark.parametrize("noise", [-0.1, 0.6, math.nan])
def test_a_share_of_wrong_labels_that_makes_no_sense_is_refused(noise: float) -> None:
    with pytest.raises(ModmetaError, match=r"label_noise must lie in 0\.\.0\.5"):
        RidgeHead(label_noise=noise)


@pytest.mark.fault(14)
@pytest.mark.parametrize("name", [*NAMES, WARY])
def test_labels_are_only_names(name: str) -> None:
    x, y, ways = support([2, 4, 3], 6, 3)
    q, order = query(6), torch.tensor([2, 0, 1])
    found = head(name).fit(x, order[y], ways)(q)[:, order]
    expected = head(name).fit(x, y, ways)(q)
    torch.testing.assert_close(found, expected)
    shuffle = torch.randperm(len(y))
    torch.testing.assert_close(head(name).fit(x[shuffle], y[shuffle], ways)(q), expected)


@pytest.mark.fault(11, 12)
@pytest.mark.parametrize("name", [*NAMES, WARY])
def test_hard_supports_stay_finite(name: str) -> None:
    same = torch.ones(4, 5, dtype=torch.double)
    for x, y, ways in (
        (same, torch.tensor([0, 0, 1, 1]), 2),  # all images alike
        (same, torch.tensor([0, 0, 2, 2]), 3),  # and a class without any
        (torch.randn(1, 5, dtype=torch.double), torch.tensor([0]), 1),
    ):
        x.requires_grad_()
        fitted = head(name).fit(x, y, ways)
        out = torch.cat([fitted(query(5)), head(name).held_out(x, y, ways)])
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert bool(torch.isfinite(out).all())
        assert bool(torch.isfinite(gradient).all())


def test_a_source_classifier_never_prefers_a_class_that_no_source_knows() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.4 * torch.randn(8, 4, generator=generator).clamp(-1, 1)
    known = torch.tensor([True, True, False, True])
    anchor = Anchor(F.normalize(weight, dim=0) * 0.9 * known, known, torch.zeros(8))
    predicted = anchor.classifier(torch.tensor(5.0))(torch.randn(50, 8, generator=generator)).argmax(1)
    assert not bool((predicted == 2).any())
    moved = anchor.classifier(torch.tensor(5.0), center=torch.full((8,), 3.0))
    x = torch.randn(5, 8, generator=generator)
    torch.testing.assert_close(moved(x + 3), anchor.classifier(torch.tensor(5.0))(x))
