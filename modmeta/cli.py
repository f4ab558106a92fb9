"""The front door: picks the command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType

from modmeta import __version__
from modmeta.allocator import keep_freed_memory
from modmeta.commands.options import COMPARE_HELP, PARSERS, lightning_help
from modmeta.errors import ModmetaError, unknown

COMMANDS = {
    "check": "check a folder of images: bad files, duplicates, contradicting and suspicious labels, balance",
    "fit": "train: source training of the backbone, then meta-training of what adapts it",
    "validate": "measure a checkpoint on the validation episodes",
    "test": "measure a checkpoint on the test episodes",
    "adapt": "adapt to the images of one folder and write an adapter file with its card",
    "predict": "classify the images of a folder with an adapter file",
    "tune": "try settings of a configuration and keep the best as a configuration that fit takes",
    "place": "search which adapter modules to put where, over a trained supernet of candidates",
    "export": "merge an adapter file into its backbone, for timm, torch.export or ONNX",
    "compare": "run any systems on the same frozen episodes and report their paired differences",
    "modules": "list the adapter modules and where they act on a backbone",
}
USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT  # what shells report after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after ``modmeta``; default: those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # OpenMP's spinning threads starve each other where ranks or programs share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if argv is None:  # the process is ours
        with suppress(ModmetaError):  # another C library than glibc, which may do well by itself
            keep_freed_memory()
    try:
        with _sigterm_exits():
            return _dispatch(arguments)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit of its own.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return INTERRUPTED
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        rank = os.environ.get("LOCAL_RANK", "0")
        print(f"modmeta: error{'' if rank == '0' else f' (rank {rank})'}: {message}", file=sys.stderr)
        return USER_ERROR


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Let SIGTERM end a command as an error would, so that nothing half-written stays; a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"modmeta {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    if name in PARSERS:
        options = PARSERS[name]().parse_args(rest)
        return int(import_module(f"modmeta.commands.{name}").run(options))
    if "-h" in rest or "--help" in rest:
        print(COMPARE_HELP if name == "compare" else lightning_help(name))
        return 0
    if name == "compare":
        return int(import_module("modmeta.commands.compare").run(rest))
    return int(import_module("modmeta.commands.fit").run(name, rest))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: modmeta COMMAND [options]\n\n"
        "Learn how to adapt one frozen vision backbone to new domains.\n\n"
        f"commands:\n{commands}\n\n"
        "modmeta COMMAND --help shows the options of a command; modmeta --version the version."
    )


def user_message(error: BaseException) -> str | None:
    """Return the one line to show for an error that a user caused, or None for any other error."""
    for each in _chain(error):
        if isinstance(each, ModmetaError):
            return _one_line(each)
    for each in _chain(error):
        if type(each).__name__ == "MisconfigurationException":
            return _one_line(each)
        if "loading state_dict for" in str(each):
            return f"the checkpoint does not fit the model: {_one_line(each)[:300]}"
        if isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError":
            return "out of memory; choose smaller images, fewer images at once, or another device"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
