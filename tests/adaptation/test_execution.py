"""Every execution backend gives the meta-gradient of a float64 loop written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.nn import functional as F

from modmeta.adaptation.execution import EXECUTIONS, Compiled, Execution, Loop, Task, TaskLoss, Vmap
from modmeta.errors import ModmetaError

WIDTH, SIZE, WAYS, RATE = 2, 8, 3, 0.3
Weights = dict[str, Tensor]


def batch_norm(x: Tensor) -> Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    return centred * ((centred * centred).mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:])


def group_norm(x: Tensor) -> Tensor:
    return F.group_norm(x, 2)


def no_norm(x: Tensor) -> Tensor:
    return x


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch": batch_norm, "group": group_norm, "layer": layer_norm, "none": no_norm,
}  # fmt: skip


def every_norm(x: Tensor) -> Tensor:
    """Return what each norm makes of it, side by side."""
    return torch.cat([norm(x) for norm in NORMS.values()], 1)


LAYERS = NORMS | {"every": every_norm}


def logits(weights: Mapping[str, Tensor], x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """As many blocks as there are weights for; the norms' scale and shift are weights of the task, as FiLM's are."""
    for block in range(sum(name.startswith("conv") for name in weights)):
        x = norm(F.conv2d(x, weights[f"conv{block}"], padding=1))
        x = x * weights[f"scale{block}"][:, None, None] + weights[f"shift{block}"][:, None, None]
        x = F.max_pool2d(x, 2).relu()
    return F.linear(x.flatten(1), weights["weight"], weights["bias"])


def start(seed: int = 0, blocks: int = 2, branches: int = 1) -> Weights:
    generator, channels = torch.Generator().manual_seed(seed), WIDTH * branches
    shapes: dict[str, tuple[int, ...]] = {"weight": (WAYS, channels * (SIZE >> blocks) ** 2), "bias": (WAYS,)}
    for block in range(blocks):
        shapes |= {f"conv{block}": (WIDTH, channels if block else 1, 3, 3)}
        shapes |= {f"scale{block}": (channels,), f"shift{block}": (channels,)}
    weights = {n: torch.randn(s, generator=generator, dtype=torch.double) for n, s in shapes.items()}
    return weights | {f"rate.{name}": torch.full_like(tensor, RATE) for name, tensor in weights.items()}


def tasks(count: int, queries: int = 2, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(WAYS)
    return [
        {
            "support": torch.randn(WAYS, 1, SIZE, SIZE, generator=generator, dtype=torch.double),
            "support_labels": labels,
            "query": torch.randn(WAYS * queries, 1, SIZE, SIZE, generator=generator, dtype=torch.double),
            "query_labels": labels.repeat_interleave(queries),
        }
        for _ in range(count)
    ]


def adapted(algorithm: str, norm: Callable[[Tensor], Tensor], weights: Weights, task: Task, steps: int) -> Weights:
    """Take inner steps; which weights move and what is differentiated through is the algorithm's."""
    names = [name for name in weights if not name.startswith("rate.")]
    moving = ["weight", "bias"] if algorithm == "anil" else names
    second_order = algorithm not in ("fomaml", "reptile")
    for _ in range(steps):
        leaves = {name: weights[name].view_as(weights[name]) for name in moving}
        loss = F.cross_entropy(logits(weights | leaves, task["support"], norm), task["support_labels"])
        gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=second_order)
        if not second_order:
            gradients = tuple(gradient.detach() for gradient in gradients)
        weights = weights | {
            name: weights[name] - (weights[f"rate.{name}"] if algorithm == "meta_sgd" else RATE) * gradient
            for name, gradient in zip(moving, gradients, strict=True)
        }
    return weights


def task_loss(algorithm: str, norm: str, steps: int = 2) -> TaskLoss:
    def loss(parameters: Mapping[str, Tensor], task: Task) -> Tensor:
        first = dict(parameters)
        last = adapted(algorithm, LAYERS[norm], first, task, steps)
        if algorithm == "reptile":  # its gradient is the way from the end of the steps back to their start
            return torch.stack([(first[n] * (first[n] - last[n]).detach()).sum() for n in first]).sum()
        return F.cross_entropy(logits(last, task["query"], LAYERS[norm]), task["query_labels"])

    return loss


def by_hand(loss: TaskLoss, parameters: Weights, given: list[dict[str, Tensor]]) -> tuple[Tensor, Weights]:
    """All tasks in one graph, one backward through their mean."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    losses = torch.stack([loss(leaves, task) for task in given])
    losses.mean().backward()
    return losses.detach(), {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def agree(
    execution: Execution, loss: TaskLoss, given: list[dict[str, Tensor]], parameters: Weights | None = None
) -> None:
    parameters = parameters or start()
    before = deepcopy(parameters)
    losses, gradients = execution.meta_gradient(loss, parameters, given)
    right_losses, right = by_hand(loss, parameters, given)
    torch.testing.assert_close(losses, right_losses, rtol=1e-10, atol=1e-10)
    assert list(gradients) == list(parameters)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-10, atol=1e-10)
        assert not gradient.requires_grad
        assert torch.equal(parameters[name], before[name])
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    assert not losses.requires_grad


ALGORITHMS = ["maml", "fomaml", "anil", "meta_sgd", "reptile"]
BACKENDS: list[Callable[[], Execution]] = [Loop, Vmap, lambda: Vmap(chunk=2)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("make", BACKENDS, ids=["loop", "vmap", "vmap-chunk"])
def test_a_backend_equals_the_loop_by_hand(make: Callable[[], Execution], algorithm: str, norm: str) -> None:
    agree(make(), task_loss(algorithm, norm), tasks(3))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_traced_graph_equals_the_loop_by_hand(algorithm: str, norm: str) -> None:
    agree(Compiled("eager", workers=1), task_loss(algorithm, norm, steps=1), tasks(2))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_compiled_code_equals_the_loop_by_hand(algorithm: str) -> None:
    """The compiler takes seconds, so one network has every norm: each feeds the head its own features."""
    agree(Compiled(), task_loss(algorithm, "every", steps=1), tasks(1), start(blocks=1, branches=len(NORMS)))


def test_compiled_code_reads_outer_tensors_when_it_runs_and_may_be_cached() -> None:
    outer, counts = torch.ones(2, dtype=torch.double), counters["inductor"]
    bypassed = counts["fxgraph_cache_bypass"]

    def loss(parameters: Mapping[str, Tensor], task: Task) -> Tensor:
        return (parameters["bias"] ** 2).sum() * outer.prod()

    execution = Compiled()
    once, _ = execution.meta_gradient(loss, start(), tasks(1))
    outer.fill_(3.0)
    again, _ = execution.meta_gradient(loss, start(), tasks(1))
    torch.testing.assert_close(again, 9 * once)
    outer.fill_(2.0)
    elsewhere, _ = Compiled().meta_gradient(loss, start(), tasks(1))
    torch.testing.assert_close(elsewhere, 4 * once)
    assert counts["fxgraph_cache_bypass"] == bypassed


def test_compiled_keeps_one_graph_per_loss_and_set_of_shapes() -> None:
    traced = []

    def loss(parameters: Mapping[str, Tensor], task: Task) -> Tensor:
        traced.append(task["query"].shape)
        return task_loss("maml", "batch")(parameters, task)

    execution = Compiled("eager")
    agree(execution, loss, tasks(2) + tasks(1, queries=3))
    traced.clear()
    execution.meta_gradient(loss, start(5), tasks(2, seed=9) + tasks(1, queries=3))
    assert traced == []
    agree(execution, task_loss("anil", "batch"), tasks(2))


def test_several_workers_give_what_one_gives() -> None:
    loss, given = task_loss("maml", "batch"), tasks(5)
    agree(Compiled("eager", workers=3), loss, given)
    one, own = Compiled("eager", workers=2).meta_gradient(loss, start(), given)
    two, same = Compiled("eager", workers=2).meta_gradient(loss, start(), given)
    assert torch.equal(one, two)
    assert all(torch.equal(own[name], same[name]) for name in own)


def test_workers_leave_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Compiled("eager", workers=2).meta_gradient(task_loss("maml", "batch"), start(), tasks(2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_compiled_graph_reads_outer_tensors_when_it_runs() -> None:
    outer = torch.ones((), dtype=torch.double)

    def loss(parameters: Mapping[str, Tensor], task: Task) -> Tensor:
        return task_loss("maml", "batch")(parameters, task) * outer

    execution, parameters = Compiled("eager"), start()
    once, _ = execution.meta_gradient(loss, parameters, tasks(1))
    outer.fill_(2.0)
    twice, _ = execution.meta_gradient(loss, parameters, tasks(1))
    torch.testing.assert_close(twice, 2 * once)


def test_a_used_compiled_backend_can_be_copied() -> None:
    execution = Compiled("eager")
    agree(execution, task_loss("maml", "none"), tasks(1))
    agree(deepcopy(execution), task_loss("maml", "none"), tasks(1))


def test_vmap_takes_tasks_of_different_shapes_in_any_order() -> None:
    mixed = [*tasks(1), *tasks(2, queries=3, seed=4), *tasks(2, seed=5)]
    agree(Vmap(chunk=2), task_loss("maml", "batch"), mixed)


def test_a_chunk_bounds_how_many_tasks_are_in_memory() -> None:
    sizes = []

    class Seen(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None: ...

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient

        @staticmethod
        def vmap(info: object, dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
            sizes.append(x.shape[dims[0]])
            return x.clone(), dims[0]

    def loss(parameters: Mapping[str, Tensor], task: Task) -> Tensor:
        return task_loss("maml", "batch")(parameters, {**task, "query": Seen.apply(task["query"])})

    agree(Vmap(chunk=2), loss, tasks(5))
    assert sizes == [2, 2, 1]


def untraceable(parameters: Mapping[str, Tensor], task: Task) -> Tensor:
    """A loss that decides by a value, as early stopping would."""
    loss = task_loss("maml", "none")(parameters, task)
    return loss if loss > 0 else -loss


@pytest.mark.parametrize("execution", [Vmap(), Compiled("eager")], ids=["vmap", "compiled"])
def test_a_loss_that_looks_at_values_is_refused_in_one_line(execution: Execution) -> None:
    agree(Loop(), untraceable, tasks(2))
    with pytest.raises(ModmetaError, match="use execution 'loop'") as caught:
        execution.meta_gradient(untraceable, start(), tasks(2))
    assert "\n" not in str(caught.value)


def test_a_missing_compiler_is_one_line() -> None:
    without = config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with without, pytest.raises(ModmetaError, match=r"install a C\+\+ compiler") as caught:
        Compiled().meta_gradient(lambda parameters, task: (parameters["bias"] ** 2).sum(), start(), tasks(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
def test_the_decompositions_are_exact_at_ties_and_odd_sizes(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 2, (2, 1, *size), generator=generator).double()  # many equal values in a window
    kernels = torch.randint(-1, 2, (3, 1, 3, 3), generator=generator).double()
    bias = torch.tensor([0.5, -0.25, 1.5], dtype=torch.double)  # exact, or rounding would break the ties

    def loss(parameters: Mapping[str, Tensor], task: Task) -> Tensor:
        y = F.max_pool2d(F.conv2d(task["query"], parameters["kernels"], parameters["bias"], padding=1), 2)
        (inner,) = torch.autograd.grad((y**3).sum(), [parameters["kernels"]], create_graph=True)
        return (inner**2).sum()

    parameters, given = {"kernels": kernels, "bias": bias}, [{"query": image}]
    _, right = by_hand(loss, parameters, given)
    _, gradients = Compiled("eager").meta_gradient(loss, parameters, given)
    torch.testing.assert_close(gradients, right, rtol=1e-10, atol=1e-10)


def test_nonsense_options_are_refused() -> None:
    with pytest.raises(ModmetaError, match="one task or more"):
        Vmap(chunk=0)
    with pytest.raises(ModmetaError, match="inductor"):
        Compiled("inducto")
    with pytest.raises(ModmetaError, match="one or more"):
        Compiled(workers=0)
    with pytest.raises(ModmetaError, match="compiled"):
        EXECUTIONS.get("compile")
