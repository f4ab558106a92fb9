"""The tables and the picture of ``policy_evidence.py``, from its figures alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from policy_conditions import NO_VETO
from policy_decisions import CHOICES, SOURCES

from modmeta.adapters import Unit
from modmeta.evaluation.compare.settings import MEAN
from modmeta.files import write_atomically
from modmeta.learners import Result

NONE = "no adaptation"
HEADS = ("source", NONE, "prototype", "ridge", "policy", "policy" + NO_VETO)


class Figures:
    """Figures by system, domain, number of shots and metric, as text."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.by_key = {(r.system, r.domain, r.shots, r.metric): r for r in results}
        self.shots = sorted({r.shots for r in results if r.shots})

    def percent(
        self, system: str, domain: str, shots: int, metric: str, *, signed: bool = False, interval: bool = True
    ) -> str:
        """Return a share in %, or a difference of shares in points."""
        found = self.by_key.get((system, domain, shots, metric))
        if found is None:
            return "-"
        sign = "+" if signed else ""
        text = f"{100 * found.value:{sign}.1f}"
        return f"{text} [{100 * found.low:{sign}.1f}, {100 * found.high:{sign}.1f}]" if interval else text


def write_table(results: Sequence[Result], path: Path) -> str:
    """Write and return all tables for which there are figures."""
    figures = Figures(results)
    tested = max((r.episodes for r in results if r.domain == MEAN), default=0)
    lines = [f"{tested} test episodes per number of shots; 95 % bootstrap intervals over episodes, seed 0.", ""]
    for part in (_variation(figures), _units(figures), _tampered(figures), _flipped(figures), _indicators(figures)):
        lines += [*part, ""] if part else []
    text = "\n".join(lines)
    write_atomically(path, text.encode())
    return text


def _variation(figures: Figures) -> list[str]:
    decided = {key[3].rpartition("/")[0]: r.episodes for key, r in figures.by_key.items() if key[1] == "all"}
    decided.pop("chance", None)
    lines = [
        f"What varies in the decisions, over {max(decided.values())} episodes, as many of each domain and number of "
        "shots; the deviation is a root mean square over units, the rest are shares of the variance in %.", "",
        "| decision | standard deviation | between domains | between shots | domains x shots | between episodes |",
        "|---|---|---|---|---|---|",
        "| *expected if domain and shots meant nothing* | | "
        + " | ".join(figures.percent("policy", "all", 0, f"chance/{part}", interval=False) for part in SOURCES) + " |",
    ]  # fmt: skip
    for name in decided:
        deviation = figures.by_key["policy", "all", 0, f"{name}/deviation"].value
        shares = [figures.percent("policy", "all", 0, f"{name}/{part}") for part in SOURCES]
        lines.append(f"| {name} | {deviation:.4f} | {' | '.join(shares)} |")
    return lines


def _units(figures: Figures) -> list[str]:
    found = dict.fromkeys(key[1:3] for key in figures.by_key if key[3].startswith("choice/"))
    cells = sorted(found, key=lambda cell: cell[1])
    units = list(dict.fromkeys(key[3][5:] for key in figures.by_key if key[3].startswith("gate/") and key[2]))
    headings = ["shots", "domain", *units, *CHOICES]
    lines = ["Mean gate of each unit after the veto (0 where it was vetoed), and how often the veto chose what, %.", "",
             f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]  # fmt: skip
    for domain, shots in cells:
        row = "policy", domain, shots
        gates = [f"{figures.by_key[*row, f'gate/{unit}'].value:.3f}" for unit in units]
        chosen = [figures.percent(*row, f"choice/{name}", interval=False) for name in CHOICES]
        lines.append(f"| {shots} | {domain} | {' | '.join(gates + chosen)} |")
    return lines


def _tampered(figures: Figures) -> list[str]:
    names = [s for s, _, _, m in figures.by_key if m == "accuracy" and s.startswith(("told", "mean", "configured"))]
    names = [name for name in dict.fromkeys(names) if not name.endswith(NO_VETO)]
    if not names:
        return []
    lines = [
        "The policy's plan replaced: accuracy in %, and the paired difference to the policy itself.", "",
        "| shots | plan | with the veto | difference | without it | difference |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for shots in figures.shots:
        for name in ("policy", *names):
            cells = []
            for veto in ("", NO_VETO):
                cells.append(figures.percent(name + veto, MEAN, shots, "accuracy", interval=False))
                pair = f"{name}{veto} - policy{veto}"
                cells.append(figures.percent(pair, MEAN, shots, "accuracy_difference", signed=True))
            lines.append(f"| {shots} | {name} | {' | '.join(cells)} |")
    return lines


def _flipped(figures: Figures) -> list[str]:
    if not any(key[0].endswith("flipped labels") for key in figures.by_key):
        return []
    lines = ["Clean and flipped support labels, % of accuracy and of episodes that end more than a point below no "
             "adaptation, or below the source classifier, which looks at no label.", "",
             "| shots | system | clean | flipped | difference | harmed, clean | harmed, flipped | below source, clean "
             "| below source, flipped |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for shots in figures.shots:
        for name in HEADS:
            both = (name, f"{name}, flipped labels")
            cells = [figures.percent(each, MEAN, shots, "accuracy", interval=False) for each in both]
            cells.append(figures.percent(name, MEAN, shots, "flipping/accuracy", signed=True))
            for metric in ("harm_rate", "harm_rate/source"):
                cells += [figures.percent(each, MEAN, shots, metric) for each in both]
            lines.append(f"| {shots} | {name} | {' | '.join(cells)} |")
    return lines


def _indicators(figures: Figures) -> list[str]:
    names = list(dict.fromkeys(s for s, _, _, m in figures.by_key if m == "accuracy" and s.startswith("without ")))
    if not names:
        return []
    lines = ["Indicators switched off, with the veto: paired difference to the policy in points of accuracy, and in "
             "thousandths of a nat of the query's loss (below 0 is better).", "",
             "| indicators | " + " | ".join(f"{k} shots, points | loss" for k in figures.shots) + " |",
             "|---" + "|---|---" * len(figures.shots) + "|"]  # fmt: skip
    for name in names:
        cells = []
        for shots in figures.shots:
            cells.append(figures.percent(f"{name} - policy", MEAN, shots, "accuracy_difference", signed=True))
            loss = figures.by_key[f"{name} - policy", MEAN, shots, "nll_difference"]
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(1000 * x for x in (loss.value, loss.low, loss.high))))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def gates_plot(results: Sequence[Result], units: Sequence[Unit], path: Path) -> None:
    """Draw mean gates after the veto over depth: a row per module, a column per number of shots, a line per domain."""
    gates = {(r.domain, r.shots, r.metric[5:]): r for r in results if r.metric.startswith("gate/") and r.shots}
    domains, shots = list(dict.fromkeys(key[0] for key in gates)), sorted({key[1] for key in gates})
    kinds = list(dict.fromkeys(unit.module.name for unit in units))
    size = (1 + 4 * len(shots), 1 + 2.2 * len(kinds))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(len(kinds), len(shots), sharex=True, sharey="row", squeeze=False)
    for row, kind in zip(panels, kinds, strict=True):
        own = sorted((unit for unit in units if unit.module.name == kind), key=lambda unit: unit.depth)
        for axes, k in zip(row, shots, strict=True):
            for place, domain in enumerate(domains):
                found = [gates[domain, k, unit.name] for unit in own]
                bars = [[r.value - r.low for r in found], [r.high - r.value for r in found]]
                axes.errorbar([u.depth for u in own], [r.value for r in found], bars, label=domain, marker="o",
                              color=colormaps["tab10"](place % 10), markersize=4, capsize=2, linewidth=1)  # fmt: skip
            axes.set_title(f"{kind}, {k} shots", fontsize="medium")
            axes.set_xlim(-0.05, 1.05)
            axes.set_ylim(bottom=0.0)  # gates are shares: what is nearly the same should look so
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("mean gate after the veto")
    for axes in panels[-1]:
        axes.set_xlabel("depth")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(path, image.getvalue())
