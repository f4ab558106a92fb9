"""The whole meta-gradient of one task as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from modmeta.adaptation.execution.base import EXECUTIONS, Execution, Task, TaskLoss, signature
from modmeta.adaptation.execution.decompositions import TABLE
from modmeta.errors import ModmetaError, unknown

BACKENDS = ("inductor", "eager")
Step = Callable[..., tuple[Tensor, ...]]
"""From parameters and the task's tensors, in their order, to the loss and the gradients."""


@EXECUTIONS.register("compiled")
class Compiled(Execution):
    """Traces inner gradients and outer backward into one graph, compiles it, and runs it task by task.

    Compiling the network instead would not do: PyTorch does not differentiate twice through a compiled module. Here
    nothing is left to differentiate, and the compiler sees what the steps have in common.

    The first task of each set of shapes pays for the compilation, seconds for a tiny network and a minute or more for
    several steps of a large one; it is worth it in a long training with one episode shape. A graph is kept per loss
    and set of shapes, and by PyTorch in a folder that outlives the process. Numbers that the loss reads from elsewhere,
    such as a step size kept as a float, are fixed in it: what changes during training has to come in as a parameter, in
    the task, or as a tensor that is changed in place.

    Attributes:
        backend: ``inductor``, or ``eager``, which runs the traced graph as it is, without a compiler or a wait.
        workers: tasks that run at the same time, each on one thread of a CPU; memory grows with it. None takes as
            many as PyTorch has threads on a CPU, and one on any other device.
    """

    def __init__(self, backend: Literal["inductor", "eager"] = "inductor", workers: int | None = None) -> None:
        if backend not in BACKENDS:
            raise unknown("backend of execution 'compiled':", backend, BACKENDS)
        if workers is not None and workers < 1:
            raise ModmetaError(f"workers of execution 'compiled' is {workers}; it needs one or more")
        self.backend = backend
        self.workers = workers
        self._steps: dict[object, Step] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}  # compiled code neither copies nor pickles

    def meta_gradient(
        self, loss: TaskLoss, parameters: Mapping[str, Tensor], tasks: Sequence[Task]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Execution.meta_gradient`.

        Raises:
            ModmetaError: if ``loss`` cannot be traced, or its graph not compiled.
        """
        fixed = {name: tensor.detach() for name, tensor in parameters.items()}
        steps = [self._step(loss, fixed, task) for task in tasks]
        losses: list[Tensor] = [torch.empty(())] * len(tasks)

        def run(worker: int) -> list[Tensor]:
            """Return the sums of the gradients of this worker's share of the tasks."""
            sums = [torch.zeros_like(tensor) for tensor in fixed.values()]
            for place in range(worker, len(tasks), workers):
                with torch.no_grad():
                    losses[place], *gradients = steps[place](*fixed.values(), *tasks[place].values())
                    torch._foreach_add_(sums, gradients)
            return sums

        device = next(iter(fixed.values())).device.type
        workers = min(self.workers or (torch.get_num_threads() if device == "cpu" else 1), len(tasks))
        shares = [run(0)] if workers == 1 else _at_once(run, workers)
        total = {name: torch.stack(own).sum(0) / len(tasks) for name, *own in zip(fixed, *shares, strict=True)}
        return torch.stack(losses), total

    def _step(self, loss: TaskLoss, parameters: Mapping[str, Tensor], task: Task) -> Step:
        key = (loss, signature(parameters), signature(task))
        if key not in self._steps:
            self._steps[key] = _compile(loss, parameters, task, self.backend)
        return self._steps[key]


def _at_once(run: Callable[[int], list[Tensor]], workers: int) -> list[list[Tensor]]:
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, range(workers)))
    finally:
        torch.set_num_threads(threads)  # a thread's own number is also that of all threads that begin later


def _compile(loss: TaskLoss, parameters: Mapping[str, Tensor], task: Task, backend: str) -> Step:
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import, and few need it

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in values[: len(parameters)]]
            named = dict(zip(parameters, leaves, strict=True))
            result = loss(named, dict(zip(task, values[len(parameters) :], strict=True)))
            return result.detach(), *torch.autograd.grad(result, leaves, materialize_grads=True)

    arguments: list[Any] = [*parameters.values(), *task.values()]
    try:
        graph = make_fx(step, decomposition_table=TABLE)(*arguments)
    except RuntimeError as error:
        raise ModmetaError(
            f"the loss cannot be traced into one graph ({_reason(error)}); use execution 'loop'"
        ) from error
    graph.graph.eliminate_dead_code()
    outer = _inputs_of_outer(graph)
    graph.recompile()
    inputs = [*arguments, *(tensor.detach() for tensor in outer)]
    run = graph if backend == "eager" else _through_inductor(graph, inputs)

    def bound(*values: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = run(*values, *(tensor.detach() for tensor in outer))
        return found

    return bound


def _inputs_of_outer(graph: Any) -> list[Tensor]:
    """Make further inputs of the tensors that a traced graph reads from elsewhere, and return these.

    As a part of the graph they would be copied into what is compiled, and keep it from being found again.
    """
    outer: dict[str, Any] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        literal = any(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
        if node.op != "get_attr" or literal:
            continue
        if node.target not in outer:
            with graph.graph.inserting_after(last):
                outer[node.target] = last = graph.graph.placeholder(node.target)
        node.replace_all_uses_with(outer[node.target])
        graph.graph.erase_node(node)
    return [getattr(graph, name) for name in outer]


def _through_inductor(graph: Any, arguments: list[Any]) -> Any:
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    options = {"cpp.threads": 1}  # what runs at the same time are tasks
    # Without a place for symbolic shapes, of which there are none, the cache of compiled graphs is passed by.
    known = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    try:
        with tracing(TracingContext(known)):
            # Converted here, sizes stay numbers; the compiler would make symbols of them.
            return torch._inductor.compile(graph, [known.from_tensor(t) for t in arguments], options=options)
    except Exception as error:
        raise ModmetaError(
            f"the graph of the loss cannot be compiled ({_reason(error)}); "
            f"install a C++ compiler or name it in CXX, empty PyTorch's compiler cache if a compilation was killed, "
            f"or use execution 'loop'"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
