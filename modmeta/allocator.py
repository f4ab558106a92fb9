"""Keep freed memory for the next task."""

from __future__ import annotations

import ctypes
import platform

from modmeta.errors import ModmetaError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LIMIT = 1 << 30


def keep_freed_memory() -> None:
    """Tell the C library of this process to keep blocks of up to 1 GiB that are freed, instead of giving them back.

    A pass through a network, and a loop over tasks, allocates and frees the same few large activations again and
    again. By default glibc returns each to the system, which then clears its pages anew: a fifth of the time of such a
    loop, and more of a pass with large images. The price is that the process keeps its largest size. It applies to
    everything in the process, so modmeta's own command line does it, and code that is imported never.

    Raises:
        ModmetaError: if the C library is not glibc, or refuses.
    """
    if platform.libc_ver()[0] != "glibc":
        raise ModmetaError("keep_freed_memory sets an option of glibc, which this system does not use; leave it out")
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    if not (mallopt(_MMAP_THRESHOLD, _LIMIT) and mallopt(_TRIM_THRESHOLD, _LIMIT)):
        raise ModmetaError("glibc refused to keep freed memory; leave keep_freed_memory out")
