"""The plots of a comparison, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modmeta.evaluation.compare.settings import MEAN, Comparison
from modmeta.files import write_atomically
from modmeta.learners import Result

_DOTS_PER_INCH = 120


def write_plots(comparison: Comparison, results: Sequence[Result], folder: Path) -> list[str]:
    """Write accuracy against shots, gain against cost, and gains per domain.

    Args:
        comparison: the settings.
        results: its figures.
        folder: where to write.

    Returns:
        The names of the files, without the suffix.
    """
    names = [*comparison.systems, *comparison.pseudo_systems]
    plots = {"accuracy": _accuracy(names, results)}
    others = [name for name in names if name != comparison.reference]
    if others:
        plots["cost"] = _cost(others, comparison, results)
        plots["domains"] = _domains(others, comparison, results)
    for name, figure in plots.items():
        image = io.BytesIO()
        FigureCanvasAgg(figure).print_png(image)
        write_atomically(folder / f"{name}.png", image.getvalue())
    return list(plots)


def _accuracy(names: Sequence[str], results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(7, 4.5), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        mine = [r for r in results if (r.system, r.domain, r.metric) == (name, MEAN, "accuracy")]
        mine.sort(key=lambda r: r.shots)
        axes.errorbar([r.shots for r in mine], [100 * r.value for r in mine], _bars(mine), label=name,
                      color=_color(place), marker="o", markersize=4, capsize=2, linewidth=1.2)  # fmt: skip
    shots = sorted({r.shots for r in results})
    axes.set_xscale("log")
    axes.set_xticks(shots, map(str, shots))
    axes.minorticks_off()
    axes.set(xlabel="support images per class", ylabel="accuracy in %, mean over domains")
    _finish(figure, [axes])
    return figure


def _cost(names: Sequence[str], comparison: Comparison, results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(10, 4.5), dpi=_DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    by_key = {(r.system, r.shots, r.metric): r for r in results if r.domain == MEAN}
    for axes, metric, factor in zip(panels, ("seconds", "backward_macs"), (1, 1e-9), strict=True):
        for place, name in enumerate([n for n in names if n in comparison.systems]):
            shots = sorted(k for system, k, found in by_key if (system, found) == (name, "gain"))
            gains = [by_key[name, k, "gain"] for k in shots]
            costs = [factor * by_key[name, k, metric].value for k in shots]
            axes.errorbar(costs, [100 * r.value for r in gains], _bars(gains), label=name, color=_color(place),
                          marker="o", markersize=4, capsize=2, linewidth=0.6)  # fmt: skip
        axes.axhline(0, color="grey", linewidth=0.8)
    panels[0].set_xscale("log")
    work = [1e-9 * r.value for r in by_key.values() if r.metric == "backward_macs" and r.value > 0]
    if work:  # heads do no work in the backbone, so the axis must have a zero
        panels[1].set_xscale("symlog", linthresh=min(work))
    panels[0].set(xlabel="seconds per adaptation", ylabel="gain in points, mean over domains")
    panels[1].set(xlabel="multiply-accumulates of backward passes, in 10⁹")
    _finish(figure, panels)
    return figure


def _domains(names: Sequence[str], comparison: Comparison, results: Sequence[Result]) -> Figure:
    gains = {(r.system, r.domain, r.shots): r for r in results if r.metric == "gain"}
    all_shots = sorted({shots for _, _, shots in gains})
    domains = [d for d in comparison.domains if any(domain == d for _, domain, _ in gains)]
    figure = Figure(figsize=(8, 1 + 2.6 * len(all_shots)), dpi=_DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(len(all_shots), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(names)
    for axes, shots in zip(panels, all_shots, strict=True):
        for place, name in enumerate(names):
            found = [(x, gains[name, d, shots]) for x, d in enumerate(domains) if (name, d, shots) in gains]
            at = [x + (place - (len(names) - 1) / 2) * width for x, _ in found]
            mine = [gain for _, gain in found]
            axes.bar(at, [100 * r.value for r in mine], width, label=name, color=_color(place), yerr=_bars(mine),
                     error_kw={"linewidth": 0.8})  # fmt: skip
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(ylabel=f"gain in points, {shots} shots")
    panels[-1].set_xticks(range(len(domains)), domains)
    _finish(figure, list(panels))
    return figure


def _bars(results: Sequence[Result]) -> np.ndarray:
    return 100 * np.array([[r.value - r.low for r in results], [r.high - r.value for r in results]])


def _color(place: int) -> tuple[float, ...]:
    return colormaps["tab20"](place % 20)


def _finish(figure: Figure, panels: Sequence[Axes]) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
