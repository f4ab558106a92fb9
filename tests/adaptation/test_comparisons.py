"""Comparisons and pair losses against other implementations and against the papers' formulas, in float64."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation import COMPARISONS, HEADS, PAIR_LOSSES, Compared
from modmeta.errors import ModmetaError

WAYS, WIDTH = 3, 5
LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 1])


@pytest.fixture
def support() -> Tensor:
    return torch.randn(len(LABELS), WIDTH, dtype=torch.double, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def query() -> Tensor:
    return torch.randn(4, WIDTH, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def fitted(name: str, support: Tensor) -> Compared:
    torch.manual_seed(0)
    return COMPARISONS.make(name, WIDTH).double().fit(support, LABELS, WAYS)


def test_prototypical_logits_are_those_of_easyfsl(support: Tensor, query: Tensor) -> None:
    methods = pytest.importorskip("easyfsl.methods")
    theirs = methods.PrototypicalNetworks(backbone=nn.Identity())
    theirs.process_support_set(support, LABELS)
    expected = -theirs(query).square()  # theirs are minus distances, the paper's minus squared ones
    ours = HEADS.get("prototypical")().double().fit(support, LABELS, WAYS)(query)
    torch.testing.assert_close(ours.log_softmax(-1), expected.log_softmax(-1), rtol=1e-10, atol=1e-10)


def test_held_out_prototypical_logits_leave_every_image_out(support: Tensor) -> None:
    head = HEADS.get("prototypical")().double()
    for row, label in enumerate(LABELS):
        rest = torch.arange(len(LABELS)) != row
        alone = head.fit(support[rest], LABELS[rest], WAYS)(support[row : row + 1]).log_softmax(-1)
        ours = head.held_out(support, LABELS, WAYS)[row : row + 1].log_softmax(-1)
        torch.testing.assert_close(ours, alone)
        assert label == LABELS[row]


def test_matching_is_that_of_easyfsl_without_context(support: Tensor, query: Tensor) -> None:
    methods = pytest.importorskip("easyfsl.methods")

    class WithoutContext(methods.MatchingNetworks):  # type: ignore[misc, name-defined]
        def encode_support_features(self, support_features: Tensor) -> Tensor:
            return support_features

        def encode_query_features(self, query_features: Tensor) -> Tensor:
            return query_features

    theirs = WithoutContext(nn.Identity(), feature_dimension=WIDTH)
    theirs.process_support_set(support, LABELS)
    theirs.one_hot_support_labels = theirs.one_hot_support_labels.double()
    # Theirs leaves the query's length in place of a factor, and adds 1e-6 to the probabilities.
    probabilities = theirs(10.0 * F.normalize(query, dim=-1)).exp() - 1e-6
    # The factor is stored as a logarithm in single precision.
    torch.testing.assert_close(fitted("matching", support)(query).exp(), probabilities, rtol=1e-6, atol=1e-8)


def test_matching_is_attention_over_the_support(support: Tensor, query: Tensor) -> None:
    matching = fitted("matching", support)
    scale = float(matching.comparison.get_parameter("log_scale").exp())
    for row, x in enumerate(query):
        weights = [math.exp(scale * float(F.cosine_similarity(x, y, dim=0))) for y in support]
        for label in range(WAYS):
            share = sum(w for w, own in zip(weights, LABELS.tolist(), strict=True) if own == label) / sum(weights)
            assert float(matching(query)[row, label].exp()) == pytest.approx(share, rel=1e-10)


def test_siamese_is_a_bias_minus_a_weighted_distance(support: Tensor, query: Tensor) -> None:
    siamese = fitted("siamese", support)
    weight = siamese.comparison.get_parameter("weight").exp().log1p()
    bias = siamese.comparison.get_parameter("bias")

    def standard(x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()

    expected = [[bias - (weight * (standard(x) - standard(y)).abs()).sum() for y in support] for x in query]
    scores = torch.tensor(expected, dtype=torch.double)
    torch.testing.assert_close(siamese.scores(query), scores)
    means = torch.stack([scores[:, label == LABELS].mean(1) for label in range(WAYS)], dim=1)
    torch.testing.assert_close(siamese(query), means)


def test_nearest_classifies_like_the_nearest_image_on_the_sphere(support: Tensor, query: Tensor) -> None:
    distances = torch.cdist(F.normalize(query, dim=-1), F.normalize(support, dim=-1))
    nearest = fitted("nearest", support)
    torch.testing.assert_close(-nearest.scores(query), distances)
    assert torch.equal(nearest(query).argmax(1), LABELS[distances.argmin(1)])
    x = support.clone().requires_grad_()
    COMPARISONS.make("nearest", WIDTH).fit(x, LABELS, WAYS)(x).sum().backward()
    assert torch.isfinite(x.grad).all()  # also at a distance of 0


def test_relation_looks_at_class_means(support: Tensor, query: Tensor) -> None:
    relation = fitted("relation", support)
    network = relation.comparison.get_submodule("network")
    for label in range(WAYS):
        mean = support[label == LABELS].mean(0)
        pairs = torch.cat([F.layer_norm(query, (WIDTH,)), F.layer_norm(mean, (WIDTH,)).expand_as(query)], dim=1)
        torch.testing.assert_close(relation(query)[:, label], network(pairs)[:, 0])


@pytest.mark.parametrize("name", COMPARISONS.names())
def test_queries_are_compared_one_by_one(name: str, support: Tensor, query: Tensor) -> None:
    compared = fitted(name, support)
    assert compared(query).shape == (len(query), WAYS)
    torch.testing.assert_close(compared(query), torch.cat([compared(x[None]) for x in query]))


@pytest.mark.parametrize("name", COMPARISONS.names())
def test_a_class_without_an_image_is_refused(name: str, support: Tensor) -> None:
    with pytest.raises(ModmetaError, match="class number 3 of the support has no image"):
        COMPARISONS.make(name, WIDTH).fit(support, LABELS, WAYS + 1)


SCORES = torch.tensor([[-0.2, -1.5], [-0.4, -0.1]], dtype=torch.double)
SAME = torch.tensor([[True, False], [False, True]])


def test_contrastive_is_hadsells_formula() -> None:
    alike = (0.2**2 + 0.1**2) / 2 / 2
    different = (0.0 + (1 - 0.4) ** 2) / 2 / 2  # 1.5 lies beyond the margin of 1
    assert float(PAIR_LOSSES.get("contrastive")(SCORES, SAME)) == pytest.approx((alike + different) / 2)


def test_logistic_weighs_pairs_of_one_class_and_of_two_alike() -> None:
    def entropy(score: float, same: bool) -> float:
        return math.log1p(math.exp(-score if same else score))

    one = [entropy(-0.2, True), entropy(-0.1, True), entropy(-1.5, False), entropy(-0.4, False)]
    logistic = PAIR_LOSSES.get("logistic")
    assert float(logistic(SCORES, SAME)) == pytest.approx(sum(one) / 4)
    wide, mask = torch.cat([SCORES, SCORES[:, 1:]], dim=1)[:1], torch.tensor([[True, False, False]])
    assert float(logistic(wide, mask)) == pytest.approx((one[0] + one[2]) / 2)


def test_mse_is_the_squared_error_of_the_relation() -> None:
    errors = [(1 / (1 + math.exp(0.2)) - 1) ** 2, (1 / (1 + math.exp(1.5))) ** 2]
    errors += [(1 / (1 + math.exp(0.4))) ** 2, (1 / (1 + math.exp(0.1)) - 1) ** 2]
    assert float(PAIR_LOSSES.get("mse")(SCORES, SAME)) == pytest.approx(sum(errors) / 4)
