"""Meta-gradients of the gradient family against double loops of plain autograd, in double precision."""

from collections.abc import Callable

import family
import pytest
import torch
from family import BODY, METHODS, Net, features, loss_of
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from modmeta.data import Episode
from modmeta.learners import GradientLearner
from modmeta.learners.gradient import step_weights

RATE = 0.3
Move = Callable[[str, Tensor, Tensor, int], Tensor]


def found(learner: GradientLearner, tasks: list[Episode]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what the learner says: mean loss and gradients, by the names of the hand-written network."""
    parameters = learner.parameters_by_name()
    loss, gradients = learner.meta_gradient(tasks, list(parameters.values()))
    of_bank = {f"bank.prior.{row}": ".".join(name.split("|")[1:]) for row, name in enumerate(learner.bank.names)}
    named = dict(zip(parameters, gradients, strict=True))
    return loss, {of_bank.get(name, name.replace("linear.", "head.")): g for name, g in named.items()}


def trained(net: Net, task: Episode, move: Move, steps: int, order: int, moving: Callable[[str], bool]) -> list[Net]:
    """Return the network after every inner step, written out."""
    path = []
    for step in range(steps):
        names = [name for name in net if moving(name)]
        # The inner gradient is taken at values that are variables of their own.
        held = {name: net[name] * 1.0 for name in net}
        value = loss_of(held, task.support, task.support_labels)
        gradients = torch.autograd.grad(value, [held[name] for name in names], create_graph=True)
        if order == 1:
            gradients = tuple(g.detach() for g in gradients)
        net = net | {name: move(name, net[name], g, step) for name, g in zip(names, gradients, strict=True)}
        path.append(net)
    return path


def expected(
    net: Net,
    tasks: list[Episode],
    move: Move,
    steps: int,
    order: int,
    moving: Callable[[str], bool] = lambda name: True,
    others: dict[str, Tensor] | None = None,
    start: Callable[[Net, Episode], Net] = lambda net, task: net,
    weights: list[float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return mean loss and gradients with respect to the network and to ``others``."""
    losses = []
    for task in tasks:
        path = trained(start(net, task), task, move, steps, order, moving)
        each = [loss_of(own, task.query, task.query_labels) for own in path]
        losses.append(each[-1] if weights is None else sum(w * x for w, x in zip(weights, each, strict=True)))
    loss = torch.stack([torch.as_tensor(each) for each in losses]).mean()
    wanted = net | (others or {})
    return loss, dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert one[1].keys() == other[1].keys()
    torch.testing.assert_close(one[0], other[0], rtol=1e-10, atol=1e-10)
    for name, gradient in other[1].items():
        torch.testing.assert_close(one[1][name], gradient, rtol=1e-10, atol=1e-10, msg=name)
        assert bool(gradient.any()), name


def sgd(name: str, w: Tensor, g: Tensor, step: int) -> Tensor:
    return w - RATE * g


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_maml(order: int, steps: int) -> None:
    learner, tasks = family.away(family.gradient(steps=steps, order=order, rate=RATE)), family.episodes()
    assert_same(found(learner, tasks), expected(family.network(learner), tasks, sgd, steps, order))


def test_the_orders_differ() -> None:
    tasks = family.episodes()
    first, second = (found(family.away(family.gradient(order=order, rate=RATE)), tasks)[1] for order in (1, 2))
    assert not torch.allclose(first["blocks.1.conv.weight"], second["blocks.1.conv.weight"], rtol=1e-3)


@pytest.mark.parametrize("adapted", [["head"], [BODY], ["full@blocks/3*", "head"]])
@pytest.mark.parametrize("order", [1, 2])
def test_what_does_not_move_is_learned_all_the_same(order: int, adapted: list[str]) -> None:
    learner = family.away(family.gradient(steps=2, order=order, rate=RATE, adapted=adapted))
    names = {"head": "head", BODY: "blocks", "full@blocks/3*": "blocks.3"}
    prefixes = tuple(names[glob] for glob in adapted)
    want = expected(family.network(learner), family.episodes(), sgd, 2, order, lambda name: name.startswith(prefixes))
    assert_same(found(learner, family.episodes()), want)
    # After the steps, the tensors that do not move are the initial ones, bit for bit.
    start, path = learner.descend(learner.parameters_by_name(), learner.task(family.episodes()[0]), 2)
    still = [name for name in start if name not in learner.moving]
    assert still
    assert all(torch.equal(path[-1][name], start[name]) for name in still)
    assert not any(torch.equal(path[-1][name], start[name]) for name in learner.moving)


@pytest.mark.parametrize("order", [1, 2])
def test_a_head_from_zero_is_any_row_shared_by_all_labels(order: int) -> None:
    learner = family.away(family.gradient(steps=2, order=order, rate=RATE, head="zero"))
    row = torch.randn(len(family.network(learner)["blocks.3.norm.bias"]), dtype=torch.double, requires_grad=True)

    def shared(net: Net, task: Episode) -> Net:
        return net | {"head.weight": row.expand(3, -1), "head.bias": row[:1].expand(3)}

    want = expected(family.network(learner), family.episodes(), sgd, 2, order, start=shared)
    assert_same(found(learner, family.episodes()), want)


@pytest.mark.parametrize("order", [1, 2])
def test_proto_maml(order: int) -> None:
    learner = family.away(family.gradient(steps=2, order=order, rate=RATE, head="prototype"))

    def with_prototypes(net: Net, task: Episode) -> Net:
        x = features(net, task.support)
        means = torch.stack([x[task.support_labels == label].mean(0) for label in range(3)])
        return net | {"head.weight": 2 * means, "head.bias": -(means**2).sum(1)}

    want = expected(family.network(learner), family.episodes(), sgd, 2, order, start=with_prototypes)
    assert_same(found(learner, family.episodes()), want)
    # Without the step, its logits are minus the squared distances to the class means, up to a constant per image.
    task = learner.task(family.episodes()[0])
    parameters = learner.parameters_by_name()
    start = learner.initial(parameters, task, task["support"])
    x, query = (features(family.network(learner), task[side]) for side in ("support", "query"))
    means = torch.stack([x[task["support_labels"] == label].mean(0) for label in range(3)])
    gap = learner.weighted_logits(start, task["query"]) + torch.cdist(query, means).square()
    torch.testing.assert_close(gap, gap[:, :1].expand(-1, 3), rtol=0, atol=1e-10)


def test_meta_sgd() -> None:
    learner = family.away(family.gradient(rule="meta_sgd", steps=2))
    rates = {name: learner.rule.rates[row].detach().clone().requires_grad_() for name, row in learner.rule.rows.items()}
    short = {name.partition("|")[2].replace("|", ".") or name: tensor for name, tensor in rates.items()}
    others = {f"rule.rates.{learner.rule.rows[name]}": tensor for name, tensor in rates.items()}
    want = expected(family.network(learner), family.episodes(), lambda n, w, g, s: w - short[n] * g, 2, 2,
                    others=others)  # fmt: skip
    assert_same(found(learner, family.episodes()), want)


def layer_rows(learner: GradientLearner) -> dict[str, int]:
    return {name.partition("|")[2].replace("|", ".") or name: row for name, row in learner.rule.rows.items()}


def test_rates_per_tensor_and_step_with_a_loss_after_every_step() -> None:
    learner = family.away(family.gradient(rule="lslr", steps=3, multi_step_epochs=5))
    rows, rates = layer_rows(learner), learner.rule.rates.detach().clone().requires_grad_()
    want = expected(family.network(learner), family.episodes(), lambda n, w, g, s: w - rates[rows[n], s] * g, 3, 2,
                    others={"rule.rates": rates}, weights=[1 / 3] * 3)  # fmt: skip
    assert_same(found(learner, family.episodes()), want)


def test_the_weights_of_the_steps_move_to_the_last() -> None:
    assert step_weights(4, 0.0).tolist() == [0.25] * 4
    assert step_weights(4, 0.5).tolist() == pytest.approx([0.125] * 3 + [0.625])
    assert step_weights(4, 1.0).tolist() == pytest.approx([0.03 / 4] * 3 + [1 - 0.09 / 4])


def test_alfa() -> None:
    learner = family.away(family.gradient(rule="alfa", steps=2))
    rows = layer_rows(learner)
    others = {f"rule.{name}": p.detach().clone().requires_grad_() for name, p in learner.rule.named_parameters()}
    net = family.network(learner)
    frozen = {name: tensor for name, tensor in learner.model.backbone.tensors().items() if name in net}
    losses = []
    for task in family.episodes():
        own = net
        for step in range(2):
            held = {name: tensor * 1.0 for name, tensor in own.items()}
            value = loss_of(held, task.support, task.support_labels)
            gradients = dict(zip(held, torch.autograd.grad(value, list(held.values()), create_graph=True), strict=True))
            # What the units hold is the change from the frozen weight.
            change = {name: own[name] - frozen.get(name, 0.0) for name in rows}
            x = torch.stack([change[n].mean() for n in rows] + [gradients[n].mean() for n in rows])
            for layer in (0, 2, 4):
                x = others[f"rule.network.{layer}.weight"] @ x + others[f"rule.network.{layer}.bias"]
                x = x.relu() if layer < 4 else x
            factor, decay = x[: len(rows)], x[len(rows) :]
            rate = others["rule.rates"][:, step] * (1 + factor)
            own = {
                n: frozen.get(n, 0.0) + (1 - decay[row]) * change[n] - rate[row] * gradients[n]
                for n, row in rows.items()
            }
        losses.append(loss_of(own, task.query, task.query_labels))
    loss, wanted = torch.stack(losses).mean(), net | others
    gradients = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    assert_same(found(learner, family.episodes()), (loss, gradients))


@pytest.mark.parametrize("rule", ["meta_sgd", "lslr", "alfa"])
def test_untrained_rules_are_the_constant_one(rule: str) -> None:
    tasks = family.episodes()
    plain, learned = (family.gradient(rule=each, steps=2, rate=0.25).double() for each in ("constant", rule))
    one, other = found(plain, tasks), found(learned, tasks)
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-10, atol=1e-10)


class Published(nn.Module):
    """The network as a module, with parameters named as those of ``family.network``."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.names = list(net)
        self.values = nn.ParameterList([tensor.detach().clone() for tensor in net.values()])

    def forward(self, images: Tensor) -> Tensor:
        net = dict(zip(self.names, self.values, strict=True))
        return features(net, images) @ net["head.weight"].T + net["head.bias"]


@pytest.mark.parametrize("steps", [1, 3])
def test_maml_against_higher(steps: int) -> None:
    higher = pytest.importorskip("higher")
    learner, tasks = family.away(family.gradient(steps=steps, rate=RATE)), family.episodes()
    model = Published(family.network(learner))
    for task in tasks:
        with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=RATE), copy_initial_weights=False) as (
            inner,
            optimizer,
        ):
            for _ in range(steps):
                optimizer.step(nn.functional.cross_entropy(inner(task.support), task.support_labels))
            (nn.functional.cross_entropy(inner(task.query), task.query_labels) / len(tasks)).backward()
    _, gradients = found(learner, tasks)
    for name, value in zip(model.names, model.values, strict=True):
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_a_task_can_be_batched(name: str) -> None:
    learner = family.away(family.gradient(**METHODS[name]))
    values = {key: parameter.detach() for key, parameter in learner.parameters_by_name().items()}
    tasks = [learner.task(episode) for episode in family.episodes()]
    want = []
    for task in tasks:
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in values.items()}
        gradients = torch.autograd.grad(learner.task_loss(leaves, task), [*leaves.values()])
        want.append(dict(zip(leaves, gradients, strict=True)))
    stacked = {key: torch.stack([task[key] for task in tasks]) for key in tasks[0]}
    batched = vmap(grad(learner.task_loss), in_dims=(None, 0))(values, stacked)
    for key in values:
        for row in range(2):
            torch.testing.assert_close(batched[key][row], want[row][key], rtol=1e-10, atol=1e-10)


def test_the_loss_of_a_task_can_be_traced() -> None:
    learner = family.away(family.gradient(rule="alfa"))
    values = {key: parameter.detach() for key, parameter in learner.parameters_by_name().items()}
    one, other = (learner.task(episode) for episode in family.episodes())
    traced = make_fx(lambda own, task: grad(learner.task_loss)(own, task))(values, one)(values, other)
    for key, gradient in grad(learner.task_loss)(values, other).items():
        torch.testing.assert_close(traced[key], gradient, rtol=1e-10, atol=1e-10)
