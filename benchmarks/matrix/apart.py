"""Work in a process of its own, so that one crash, one hang or one large model does not end a whole run."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "timm", "modmeta.adapters"])  # imported once instead of in every process


def in_process(work: Callable[..., dict[str, Any]], *arguments: Any, seconds: float) -> dict[str, Any]:
    """Return what ``work`` returns, or ``{"failure": why}`` if it raises, dies or takes too long.

    Args:
        work: a function of the top level of a file.
        *arguments: its arguments; they are pickled.
        seconds: how long it may take.
    """
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_child, args=(theirs, work, arguments))
    begin = time.perf_counter()
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(seconds) else {"failure": f"no result after {seconds:.0f} s"}
    except EOFError:
        process.join()
        found = {"failure": f"the process died with exit code {process.exitcode}"}
    process.kill()
    process.join()
    return found | {"seconds": round(time.perf_counter() - begin, 1)}


def _child(pipe: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    try:
        pipe.send(work(*arguments))
    except Exception as error:
        pipe.send({"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
