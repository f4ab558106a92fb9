"""The closed form of features and class attributes, against direct solves and a world that is linear."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import HEADS, Anchor, Compatibility, Head, bilinear
from modmeta.adaptation.bilinear import bilinear_ridge, calibration, harmonic_mean
from modmeta.errors import ModmetaError

DOUBLE = torch.double


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.T @ x / len(x), x.T @ y / len(x)


@pytest.mark.parametrize(("f", "a"), [(0.1, 0.3), (1e-3, 1.0), (2.0, 1e-3)])
def test_the_closed_form_is_the_least_squares_solution(f: float, a: float) -> None:
    x, y, s = draw(9, 4), draw(9, 5, seed=1), draw(5, 3, seed=2)
    n, c, d, width = len(x), len(s), x.shape[1], s.shape[1]
    # vec(A V B') = (A kron B) vec(V) with rows that vary slowest: the whole objective as one least-squares problem.
    rows = [
        torch.kron(x, s) / (n * c) ** 0.5,
        torch.kron(torch.eye(d, dtype=DOUBLE), s) * (f / c) ** 0.5,
        torch.kron(x, torch.eye(width, dtype=DOUBLE)) * (a / n) ** 0.5,
        torch.eye(d * width, dtype=DOUBLE) * (f * a) ** 0.5,
    ]
    targets = torch.cat([y.flatten() / (n * c) ** 0.5, torch.zeros(sum(map(len, rows[1:])), dtype=DOUBLE)])
    expected = torch.linalg.lstsq(torch.cat(rows), targets[:, None]).solution.view(d, width)
    torch.testing.assert_close(bilinear_ridge(*moments(x, y), s, f, a), expected, rtol=1e-9, atol=1e-12)


def test_attributes_that_name_the_class_make_it_ridge_regression() -> None:
    x, y, c = draw(20, 6), F.one_hot(torch.arange(20) % 4).to(DOUBLE), 4
    gram, cross = moments(x, y)
    ridge = torch.linalg.solve(gram + 0.2 * torch.eye(6, dtype=DOUBLE), cross)
    found = bilinear_ridge(gram, cross, torch.eye(c, dtype=DOUBLE), 0.2, 0.05)
    torch.testing.assert_close(found, ridge / (1 + c * 0.05))


# ---------------------------------------------------------------------- a linear world

CORNERS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)), dtype=DOUBLE)
NEW = (3, 7, 12, 21, 30)
NAMES = [f"class{number}" for number in range(len(CORNERS))]


def world(domains: int = 2, noise: float = 0.05) -> tuple[dict[str, tuple[Tensor, Tensor]], list[int], Tensor]:
    """Return features of the seen classes in some domains, the numbers of these, and how attributes make features."""
    seen = [number for number in range(len(CORNERS)) if number not in NEW]
    mix, found = draw(5, 24, seed=3), {}
    for k in range(domains):
        y = torch.arange(len(seen)).repeat(6)
        found[f"domain{k}"] = CORNERS[seen][y] @ mix + noise * draw(len(y), 24, seed=4 + k) + draw(24, seed=9 + k), y
    return found, seen, mix


def measured(domains: int = 2, noise: float = 0.05) -> Compatibility:
    made = Compatibility()
    found, seen, _ = world(domains, noise)
    made.measure(found, [NAMES[number] for number in seen], CORNERS[seen])
    return made


def accuracy(anchor: Anchor, x: Tensor, y: Tensor) -> float:
    predicted = anchor.classifier(torch.ones((), dtype=DOUBLE), x.mean(0))(x).argmax(1)
    return float((predicted == y).double().mean())


@pytest.mark.parametrize("domains", [1, 3])
def test_in_a_linear_world_classes_without_an_image_are_recovered(domains: int) -> None:
    made = measured(domains)
    _, _, mix = world()
    y = torch.arange(len(CORNERS)).repeat(4)
    x = CORNERS[y] @ mix + 0.05 * draw(len(y), 24, seed=50) + draw(24, seed=51)  # a new domain
    new = torch.isin(y, torch.tensor(NEW))
    among = {number: place for place, number in enumerate(NEW)}
    alone = made.anchor([NAMES[number] for number in NEW], CORNERS[list(NEW)])
    x_new, y_new = x[new] - x.mean(0), torch.tensor([among[int(each)] for each in y[new]])
    scores = F.normalize(x_new, dim=1) @ alone.weight
    assert bool((scores.argmax(1) == y_new).all())
    # Among all classes, too: the penalty keeps those that were seen from winning everything.
    assert accuracy(made.anchor(NAMES, CORNERS), x, y) == 1.0
    # And with the attributes dealt out wrongly it is a matter of luck.
    wrong = CORNERS[torch.randperm(len(CORNERS), generator=torch.Generator().manual_seed(0))]
    assert accuracy(made.anchor(NAMES, wrong), x, y) < 0.3


def test_what_is_left_out_has_no_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    # Strengths that are fixed: they are chosen by what is left out.
    monkeypatch.setattr(bilinear, "_FEATURE_RIDGES", (1e-2,))
    monkeypatch.setattr(bilinear, "_ATTRIBUTE_RIDGES", (1e-2,))
    found, seen, _ = world(3)
    names, attributes = [NAMES[number] for number in seen], CORNERS[seen]
    in_fold = torch.arange(len(seen)) % 4 == 2

    def jumbled(domain: str, x: Tensor, y: Tensor) -> Tensor:
        rows = (in_fold[y] if domain != "domain1" else y >= 0).nonzero()[:, 0]
        return x.index_copy(0, rows, x[rows.flip(0)])

    made, other = Compatibility(), Compatibility()
    made.measure(found, names, attributes)
    other.measure({domain: (jumbled(domain, x, y), y) for domain, (x, y) in found.items()}, names, attributes)
    for aligned in (True, False):
        left_out = [each.anchor(names, attributes, "domain1", 2, aligned).weight for each in (made, other)]
        torch.testing.assert_close(*left_out)
        for without, fold in (("domain1", None), (None, 2), (None, None), ("domain0", 2)):
            used = [each.anchor(names, attributes, without, fold, aligned).weight for each in (made, other)]
            assert not torch.allclose(*used)


def test_only_classes_that_were_fitted_to_pay_a_penalty() -> None:
    made = measured(noise=3.0)  # a world that can be read without errors needs none
    penalised = [made.anchor(NAMES, CORNERS, fold=fold).bias < 0 for fold in (None, 1)]
    names = list(made.classes)
    assert [name for name, below in zip(NAMES, penalised[0], strict=True) if below] == names
    expected = [name for number, name in enumerate(names) if number % made.folds != 1]
    assert [name for name, below in zip(NAMES, penalised[1], strict=True) if below] == expected


def test_a_single_domain_cannot_be_left_out_but_its_classes_can() -> None:
    made = measured(1)
    names = list(made.classes)
    attributes = CORNERS[[NAMES.index(name) for name in names]]
    whole, hidden = made.anchor(names, attributes), made.anchor(names, attributes, without="domain0")
    assert torch.equal(whole.weight, hidden.weight)
    assert torch.equal(whole.center, hidden.center)
    assert not torch.equal(whole.weight, made.anchor(names, attributes, fold=0).weight)


def test_an_attribute_that_never_varies_is_nothing() -> None:
    found, seen, _ = world()
    names = [NAMES[number] for number in seen]
    plain, padded = Compatibility(), Compatibility()
    plain.measure(found, names, CORNERS[seen])
    padded.measure(found, names, F.pad(CORNERS[seen], (0, 1), value=7.0))
    new = CORNERS[list(NEW)]
    anchors = [plain.anchor(names[:5], new), padded.anchor(names[:5], F.pad(new, (0, 1), value=-3.0))]
    torch.testing.assert_close(anchors[0].weight, anchors[1].weight)


def test_units_of_the_attributes_make_no_difference() -> None:
    found, seen, _ = world()
    names = [NAMES[number] for number in seen]
    plain, scaled = Compatibility(), Compatibility()
    plain.measure(found, names, CORNERS[seen])
    scaled.measure(found, names, 100 * CORNERS[seen] + 40)
    new = CORNERS[list(NEW)]
    torch.testing.assert_close(plain.anchor(names[:5], new).weight, scaled.anchor(names[:5], 100 * new + 40).weight)


def test_the_state_comes_back() -> None:
    made, again = measured(), Compatibility()
    again.set_extra_state(made.get_extra_state())
    one, other = (each.anchor(NAMES, CORNERS, "domain0", 1, False) for each in (made, again))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
    assert torch.equal(made.scale, again.scale)


def test_what_cannot_be_measured_is_refused() -> None:
    found, seen, _ = world()
    few = {domain: (x[y < 2], y[y < 2]) for domain, (x, y) in found.items()}
    with pytest.raises(ModmetaError, match="needs 3 training classes or more, and there are 2"):
        Compatibility().measure(few, NAMES[:2], CORNERS[:2])
    with pytest.raises(ModmetaError, match="the same for all training classes"):
        Compatibility().measure(found, [NAMES[number] for number in seen], torch.ones(len(seen), 2, dtype=DOUBLE))


# ---------------------------------------------------------------------- calibration and head


def test_the_harmonic_mean() -> None:
    found = harmonic_mean(torch.tensor([0.5, 1.0, 0.0, 0.0, 0.3]), torch.tensor([0.5, 0.5, 0.7, 0.0, 0.6]))
    torch.testing.assert_close(found, torch.tensor([0.5, 2 / 3, 0.0, 0.0, 0.4]))


def test_calibration_is_what_counting_finds() -> None:
    scores, labels = draw(60, 5), torch.arange(60) % 5
    seen = torch.tensor([True, False, True, True, False])
    penalties = (0.0, 0.3, 1.0, 9.0)
    for penalty, found in zip(penalties, calibration(scores, labels, seen, penalties), strict=True):
        predicted = (scores - penalty * seen).argmax(1)
        per_class = [float((predicted[labels == c] == c).double().mean()) for c in range(5)]
        s, u = (per_class[0] + per_class[2] + per_class[3]) / 3, (per_class[1] + per_class[4]) / 2
        assert float(found) == pytest.approx(2 * s * u / (s + u) if s + u else 0.0)


def head(name: str) -> Head:
    made = HEADS.get(name)().double()
    with torch.no_grad():  # in double from the start, as the oracles are
        made.log_scale.fill_(math.log(10))
        made.log_ridge.fill_(math.log(0.4))
    return made


def test_the_head_is_a_ridge_regression_on_what_the_anchor_leaves() -> None:
    x, y, target = draw(12, 6), torch.arange(12) % 3, F.one_hot(torch.arange(12) % 3).to(DOUBLE) - 1 / 3
    anchor = Anchor(
        draw(6, 3, seed=1), torch.ones(3, dtype=torch.bool), x.mean(0), torch.tensor([-0.5, 0.0, -0.2], dtype=DOUBLE)
    )
    made, bias = head("attribute"), anchor.bias / 5  # four images of each class, and a fade of 1
    z = F.normalize(x - x.mean(0), dim=1)
    residual = target - z @ anchor.weight - bias

    def fitted(rows: Tensor) -> Tensor:
        gram = z[rows].T @ z[rows] + 0.4 * torch.eye(6, dtype=DOUBLE)
        return anchor.weight + torch.linalg.solve(gram, z[rows].T @ residual[rows])

    found = made.fit(x, y, 3, anchor)
    torch.testing.assert_close(found.weight, fitted(torch.arange(12)))
    torch.testing.assert_close(found.bias, bias)
    others = [torch.arange(12)[torch.arange(12) != row] for row in range(12)]
    refits = torch.stack([z[row] @ fitted(rest) + bias for row, rest in enumerate(others)])
    torch.testing.assert_close(made.held_out(x, y, 3, anchor), 10 * refits)


def test_without_an_offset_the_head_is_the_anchored_ridge() -> None:
    x, y = draw(12, 6), torch.arange(12) % 3
    anchor = Anchor(draw(6, 3, seed=1), torch.ones(3, dtype=torch.bool), x.mean(0))
    torch.testing.assert_close(*(head(name).fit(x, y, 3, anchor)(x) for name in ("attribute", "anchored_ridge")))
