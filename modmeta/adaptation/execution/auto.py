"""The fastest of the other backends, by a trial on the first tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modmeta.adaptation.execution.base import EXECUTIONS, Execution, Task, TaskLoss
from modmeta.adaptation.execution.compiled import Compiled
from modmeta.adaptation.execution.loop import Loop
from modmeta.adaptation.execution.vmap import Vmap
from modmeta.errors import ModmetaError

_ROUNDS = 2


@EXECUTIONS.register("auto")
class Auto(Execution):
    """Measures the other backends on the first tasks that it is given, says which was fastest, and stays with it.

    The trial takes three meta-gradients of each backend. A backend that cannot do the loss at hand is out. There is one
    choice for all shapes and ranks, the first rank's: all ranks have to make their first call. It is part of a
    checkpoint, so a resumed run goes on as it began; two runs from the same seed may choose differently, and then
    differ by rounding.

    Attributes:
        chunk: most tasks that ``vmap`` has in memory at once. None takes them all, which is faster on a GPU.
        compile: whether ``compiled`` takes part; the trial then waits for the compiler, which may take minutes.
        choice: the name of the backend that was chosen; None until then.
    """

    def __init__(self, chunk: int | None = 4, compile: bool = False) -> None:
        self.candidates: dict[str, Execution] = {"loop": Loop(), "vmap": Vmap(chunk)}
        if compile:
            self.candidates["compiled"] = Compiled()

    def meta_gradient(
        self, loss: TaskLoss, parameters: Mapping[str, Tensor], tasks: Sequence[Task]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Execution.meta_gradient`.

        Raises:
            ModmetaError: if a backend was chosen that these options leave out.
        """
        if self.choice is None:
            self.choice = self._choose(loss, parameters, tasks)
        if self.choice not in self.candidates:
            raise ModmetaError(f"this run is computed by execution {self.choice!r}; set compile of execution 'auto'")
        return self.candidates[self.choice].meta_gradient(loss, parameters, tasks)

    def _choose(self, loss: TaskLoss, parameters: Mapping[str, Tensor], tasks: Sequence[Task]) -> str:
        from lightning.pytorch.utilities.rank_zero import rank_zero_info  # slow to import, and once is enough

        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        found: list[str | None] = [None]
        if not ranks or torch.distributed.get_rank() == 0:
            seconds, refusals = self._measure(loss, parameters, tasks)
            found = [min(seconds, key=lambda name: seconds[name])]
            times = ", ".join(f"{name} {1000 * seconds[name] / len(tasks):.1f} ms" for name in seconds)
            rank_zero_info("; ".join([f"execution {found[0]!r} is chosen: {times} per task", *refusals]))
        if ranks:
            torch.distributed.broadcast_object_list(found, src=0)
        (name,) = found
        assert name is not None
        return name

    def _measure(
        self, loss: TaskLoss, parameters: Mapping[str, Tensor], tasks: Sequence[Task]
    ) -> tuple[dict[str, float], list[str]]:
        """Return the shortest time of every backend in seconds, and why others are out."""
        device = next(iter(parameters.values())).device
        seconds: dict[str, float] = {}
        refusals = []

        def timed(execution: Execution) -> float:
            begin = time.perf_counter()
            execution.meta_gradient(loss, parameters, tasks)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - begin

        for name, execution in self.candidates.items():
            try:
                timed(execution)
            except (ModmetaError, torch.OutOfMemoryError, MemoryError) as error:
                if name == "loop":  # what the plainest cannot do is no question of the backend
                    raise
                refusals.append(f"{name} is out: {error}".partition("\n")[0])
            else:
                seconds[name] = float("inf")
        for _ in range(_ROUNDS):
            for name, least in seconds.items():
                seconds[name] = min(least, timed(self.candidates[name]))
        return seconds, refusals
