"""Exchanging adapters in a host: size of a file, time to load and swap it, and throughput with many residents.

    python benchmarks/hot_swap.py --weights tf_efficientnet_lite0.safetensors

FiLM on every normalisation layer of EfficientNet-Lite0, with a head. Times are medians, with the 95 % interval of the
median from order statistics; run it on a quiet machine. A swap alone is a rollback, which publishes an adapter that is
prepared already.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from modmeta.adaptation import Adapted, Classifier, Plan
from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.adapters.adapter_file import write_adapter
from modmeta.backbone import Backbone
from modmeta.serving import AdapterHost

BACKBONE = "tf_efficientnet_lite0"
SIZE_KB, LOAD_MS, SWAP_MS = 250.0, 50.0, 1.0
LOT = 20  # swaps between two preparations of as many adapters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="local weights; default: random ones")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--ways", type=int, default=7, help="classes of every domain")
    parser.add_argument("--repeats", type=int, default=100, help="loads and swaps")
    parser.add_argument("--residents", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batch", type=int, default=16, help="images of a batch, dealt out to the domains in turn")
    parser.add_argument("--batches", type=int, default=20, help="batches per number of residents")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weights = str(options.weights) if options.weights else False
    model = AdaptedBackbone(Backbone(BACKBONE, weights, options.image_size, options.seed), [UnitConfig("film")])
    many = [adapted(model, options.ways, options.seed + number) for number in range(max(2, *options.residents))]
    layers = sum(len(unit.sites) for unit in model.units)
    what = f"{BACKBONE}, {'given' if weights else 'random'} weights, {options.image_size} px, FiLM on {layers} layers"
    print(f"{what}, {options.ways} classes, seed {options.seed}, {options.threads} threads\n")
    print("| figure | median | 95 % interval | runs | wanted |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        fast = exchanges(model, many, Path(folder) / "domain.safetensors", options.repeats)
    throughput(model, many, options)
    if not fast:
        raise SystemExit("\nFAILED: a figure is not as wanted")


def adapted(model: AdaptedBackbone, ways: int, seed: int) -> Adapted:
    """Return an adaptation to a domain of its own, every unit open."""
    generator = torch.Generator().manual_seed(seed)
    names, width = tuple(unit.name for unit in model.units), model.backbone.feature_dim
    ones, scalar = torch.ones(len(names)), torch.tensor(0.0)
    plan = Plan(names, 0.8 * ones, 0.02 * ones[:, None], 0 * ones, ones[:, None], scalar + 1, scalar, scalar)
    state = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in model.fresh().items()}
    weight = torch.randn(width, ways, generator=generator)
    head = Classifier(weight, torch.zeros(ways), torch.zeros(width), torch.tensor(10.0), True)
    return Adapted(state, plan, head, tuple(f"class {way}" for way in range(ways)))


def exchanges(model: AdaptedBackbone, many: list[Adapted], path: Path, repeats: int) -> bool:
    """Print size and times of exchanging one domain's adapter beside the others, and whether all are as wanted."""
    write_adapter(path, model, many[0].to_file({"domain": "sketch"}))
    kilobytes = path.stat().st_size / 1000
    print(f"| size of the file, kB | {kilobytes:.1f} | - | 1 | < {SIZE_KB:g} |")
    host = AdapterHost(model, history=LOT)
    for number, one in enumerate(many):
        host.add(str(number), one)
    loads = [seconds(lambda: host.load("0", path)) for _ in range(repeats)]
    swaps: list[float] = []
    while len(swaps) < repeats:
        for turn in range(LOT):
            host.replace("1", many[turn % 2])
        swaps += [seconds(lambda: host.rollback("1")) for _ in range(LOT)]
    load = row("load and swap, ms", [1e3 * each for each in loads], f"< {LOAD_MS:g}")
    swap = row("swap alone, ms", [1e3 * each for each in swaps], f"< {SWAP_MS:g}")
    return kilobytes < SIZE_KB and load < LOAD_MS and swap < SWAP_MS


def throughput(model: AdaptedBackbone, many: list[Adapted], options: argparse.Namespace) -> None:
    """Print how many images per second are answered, with one resident adapter and with many."""
    size = options.image_size
    images = torch.rand(options.batch, 3, size, size, generator=torch.Generator().manual_seed(options.seed))
    plain = torch.no_grad()(model.backbone)
    speeds = [rate(lambda: plain(images), images) for _ in range(options.batches + 1)][1:]
    row("images/s, the backbone alone", speeds, "-")
    for residents in options.residents:
        host = AdapterHost(model)
        for number in range(residents):
            host.add(str(number), many[number])
        domains = [str(row % residents) for row in range(options.batch)]
        ask = lambda host=host, domains=domains: host.predict(images, domains)  # noqa: E731
        speeds = [rate(ask, images) for _ in range(options.batches + 1)][1:]  # the first one warms up
        row(f"images/s, batches of {options.batch}, {residents} resident", speeds, "-")


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def rate(call: Callable[[], object], images: Tensor) -> float:
    return len(images) / seconds(call)


def row(name: str, values: list[float], wanted: str) -> float:
    """Print a line of the table and return the median."""
    ordered, count = sorted(values), len(values)
    half = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    print(f"| {name} | {median:.4g} | {ordered[low]:.4g} to {ordered[high]:.4g} | {count} | {wanted} |")
    return median


if __name__ == "__main__":
    main()
