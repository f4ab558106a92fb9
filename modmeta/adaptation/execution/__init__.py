"""Execution backends: how the meta-gradient of a batch of tasks is computed."""

from modmeta.adaptation.execution.auto import Auto
from modmeta.adaptation.execution.base import EXECUTIONS, Execution, Task, TaskLoss
from modmeta.adaptation.execution.compiled import Compiled
from modmeta.adaptation.execution.loop import Loop
from modmeta.adaptation.execution.vmap import Vmap

__all__ = ["EXECUTIONS", "Auto", "Compiled", "Execution", "Loop", "Task", "TaskLoss", "Vmap"]
