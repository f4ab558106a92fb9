"""Work that must not take on the state of the code that happened to ask for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """Return the result of ``work``, done in a thread of its own.

    ``torch.func`` transforms, inference mode, autocast and the default device belong to a thread. What is
    built lazily and kept, such as an alias of a parameter, would stay bound to those of its first user.
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(work).result()
