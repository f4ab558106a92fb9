"""Meta-gradients and episodes per second, beside learn2learn, TorchOpt, higher and easyfsl where they are installed.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 python benchmarks/throughput.py --output docs/throughput.md

First all entries of a method have to give the same meta-gradient in float64 (four channels, two tasks). Then they take
turns, in the reverse order every second round, in float32, on the four-block network, 5-way 1-shot, 15
queries. Ratios are paired within rounds, with 95 % bootstrap intervals of their median; processor time is that of the
whole process. Memory is the peak in four meta-gradients above what a fresh process holds after a first one. Exits
with 1 if gradients differ.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matrix.apart import in_process
from peers import ours, sampling
from peers.setting import METHODS, Entry, Setting

from modmeta.allocator import keep_freed_memory
from modmeta.errors import ModmetaError
from modmeta.files import write_atomically

PEERS = ("learn2learn", "torchopt", "higher")
TOLERANCE = 1e-9
EPISODE_ROUNDS = 7
AIMS = {("maml", 1): 1.5, ("maml", 5): 1.5, ("meta_sgd", 1): 1.5, ("meta_sgd", 5): 1.5,
        ("fomaml", 1): 1.4, ("fomaml", 5): 1.4, ("reptile", 5): 2.5}  # fmt: skip
"""By method and steps, how many times as fast as the best peer an execution is to be on a CPU."""
Row = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--executions", nargs="+", help="loop compiled vmap; without compiled if quick")
    parser.add_argument("--chunk", type=int, default=4, help="tasks at once under vmap")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep-freed", action="store_true", help="keep_freed_memory() for all entries alike")
    parser.add_argument("--quick", action="store_true", help="three rounds, four tasks of a tiny network")
    parser.add_argument("--output", type=Path, help="the page to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_freed:
        keep_freed_memory()
    width = 64
    if options.quick:
        options.rounds, options.tasks, width = 3, 4, 4
    options.executions = options.executions or ["loop", *(["compiled"] if not options.quick else []), "vmap"]
    settings = [
        Setting(method, steps, options.tasks, width)
        for method in options.methods for steps in (options.steps if method != "protonet" else [1])
    ]  # fmt: skip
    absent = [name for name in (*PEERS, "easyfsl") if not available(sampling.MODULES.get(name, name))]
    installed = [name for name in PEERS if name not in absent]
    lines = [
        "# Throughput", "", __doc__.split("\n\n    OMP")[0], "",
        f"`OMP_WAIT_POLICY=PASSIVE python {shlex.join(sys.argv)}`; {options.tasks} tasks.", "",
        __doc__.split(".md\n\n")[1].strip().replace("\n", " "), "",
        f"PyTorch {torch.__version__}, {options.threads} threads, {platform.processor() or platform.machine()}, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}, seed 0. "
        f"Absent here: {', '.join(absent) or 'none'}.", "",
    ]  # fmt: skip
    worst = 0.0
    for setting in settings:
        entries = [(f"modmeta {name}", ("ours", name)) for name in executions(setting, options.executions)]
        entries += [(name, (name, "")) for name in installed if setting.method in peer(name).METHODS]
        difference = disagreement(setting, entries, options.chunk)
        worst = max(worst, difference)
        heading = f"## {setting.method}, {setting.steps} inner step{'s'[: setting.steps > 1]}"
        page = table(setting, entries, options)
        agreement = f"Largest relative difference of meta-gradients in float64: {difference:.1e}."
        lines += [heading, "", agreement, "", *page]
        print("\n".join(lines[-len(page) - 4 :]), flush=True)
    lines += episodes_page(0.4 if options.quick else 2.0)
    print("\n".join(lines[-8:]))
    if options.output is not None:
        write_atomically(options.output, "\n".join(lines).encode())
    raise SystemExit(1 if worst > TOLERANCE else 0)


def available(name: str) -> bool:
    """Return whether a peer can be imported; what stands in its way is printed."""
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name} is left out: {type(error).__name__}: {error}")
        return False
    return True


def peer(name: str) -> Any:
    return importlib.import_module(f"peers.with_{name}")


def executions(setting: Setting, wanted: list[str]) -> list[str]:
    return wanted if setting.method != "protonet" else ["loop"]


def make(setting: Setting, kind: str, execution: str, chunk: int) -> Entry:
    if kind != "ours":
        entry: Entry = peer(kind).entry(setting)
        return entry
    return ours.entry(setting, execution, {"chunk": chunk} if execution == "vmap" else None)


def disagreement(setting: Setting, entries: list[tuple[str, tuple[str, str]]], chunk: int) -> float:
    """Return how far any entry is from the first one, relative to its norm; compiled ones run the traced graph."""
    tiny, found = replace(setting, tasks=2, width=4, double=True), []
    for _, (kind, execution) in entries:
        if execution == "compiled":
            found.append(ours.entry(tiny, execution, {"backend": "eager"})())
        else:
            found.append(make(tiny, kind, execution, chunk)())
    first = found[0]
    return max(
        float((other[name] - first[name]).norm() / first[name].norm().clamp_min(1e-12))
        for other in found[1:] for name in first if name in other
    )  # fmt: skip


def table(setting: Setting, entries: list[tuple[str, tuple[str, str]]], options: argparse.Namespace) -> list[str]:
    made = [(name, make(setting, *kind, options.chunk)) for name, kind in entries]
    wall, cpu = (np.zeros((options.rounds, len(made))) for _ in range(2))
    for _, entry in made:
        entry()
    for number, order in enumerate(turns(len(made), options.rounds)):
        for place in order:
            begin, spent = time.perf_counter(), time.process_time()
            made[place][1]()
            wall[number, place] = time.perf_counter() - begin
            cpu[number, place] = time.process_time() - spent
    rows, megabytes = [], {}
    peers = [place for place, (_, (kind, _)) in enumerate(entries) if kind != "ours"]
    best = min(peers, key=lambda place: np.median(wall[:, place])) if peers else 0
    for place, (name, kind) in enumerate(entries):
        memory = in_process(
            peak_above_base, setting, kind, options.chunk, options.threads, options.keep_freed, seconds=1800
        )
        megabytes[name] = memory.get("megabytes", float("nan"))
        rows.append([
            name, f"{setting.tasks / np.median(wall[:, place]):.1f}",
            f"{1000 * np.median(cpu[:, place]) / setting.tasks:.1f}",
            ratio(wall[:, best] / wall[:, place]), ratio(cpu[:, best] / cpu[:, place]),
            memory.get("failure") or f"{memory['megabytes']:.0f}",
        ])  # fmt: skip
    than = entries[best][0]
    heads = ["entry", "tasks/s", "CPU-ms/task", f"times as fast as {than}", "the same, CPU time", "peak memory, MB"]
    own = min(
        (place for place in range(len(entries)) if place not in peers), key=lambda place: np.median(wall[:, place])
    )
    line = f"The fastest here is {entries[own][0]}"
    if peers:
        line += f": {rows[own][3]} times {than}'s tasks per second"
        aim = AIMS.get((setting.method, setting.steps))
        line += f" (aim: {aim})" if aim else ""
    if "learn2learn" in megabytes:
        line += f", with {megabytes[entries[own][0]]:.0f} MB; learn2learn takes {megabytes['learn2learn']:.0f} MB"
    return [line + ".", "", *markdown(heads, rows)]


def turns(entries: int, rounds: int) -> Iterator[list[int]]:
    for number in range(rounds):
        order = list(range(entries))
        yield order[::-1] if number % 2 else order


def ratio(paired: np.ndarray) -> str:
    """Return the median of paired ratios and its 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    drawn = np.median(paired[random.integers(len(paired), size=(2000, len(paired)))], axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{np.median(paired):.2f} [{low:.2f}, {high:.2f}]"


def peak_above_base(setting: Setting, kind: tuple[str, str], chunk: int, threads: int, keep: bool) -> dict[str, Any]:
    """Return the megabytes that four further meta-gradients need above what is held after a first."""
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    entry = make(setting, *kind, chunk)
    entry()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    base = memory_of("VmRSS")
    for _ in range(4):
        entry()
    return {"megabytes": memory_of("VmHWM") - base}


def memory_of(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def episodes_page(seconds: float) -> list[str]:
    store = sampling.InMemory()
    samplers = {
        name: sampler(store) for name, sampler in sampling.SAMPLERS.items()
        if name == "modmeta" or available(sampling.MODULES[name])
    }  # fmt: skip
    speeds: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(EPISODE_ROUNDS):
        for name, sampler in samplers.items():
            speeds[name].append(sampling.tasks_per_cpu_second(sampler, seconds))
    rows = [[name, f"{statistics.median(of):,.0f}", f"{min(of):,.0f} to {max(of):,.0f}"] for name, of in speeds.items()]
    text = f"5-way 1-shot, 15 queries, from {sampling.CLASSES} classes of {sampling.IMAGES} images in memory; seed 0; "
    text += f"{EPISODE_ROUNDS} rounds, interleaved."
    return ["## Drawing episodes", "", text, "", *markdown(["entry", "tasks per CPU-second", "least to most"], rows)]


def markdown(heads: Row, rows: list[Row]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]] + [""]


if __name__ == "__main__":
    try:
        main()
    except ModmetaError as error:
        raise SystemExit(f"error: {error}") from error
