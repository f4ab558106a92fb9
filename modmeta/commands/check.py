"""``check``: what is wrong with a folder of images, for people and for programs."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from modmeta.backbone import Backbone
from modmeta.data.audit import (
    Balance,
    Finding,
    Survey,
    count_images,
    examine,
    find_problems,
    manifest_lines,
    render_page,
    summarise,
    take_survey,
    thumbnail,
)
from modmeta.data.decode import decode_image, printable
from modmeta.data.inspect import WORKERS
from modmeta.errors import ModmetaError
from modmeta.evaluation.terminal import console
from modmeta.files import write_atomically

CLEAN, WRONG = 0, 2
FILES = ("manifest.jsonl", "check.json", "check.html")
_SHOWN_CASES = 5
_SHOWN_CLASSES = 30
_SHOWN_DOMAINS = 8
_BATCH = 32
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def run(options: argparse.Namespace) -> int:
    """Check a folder, write the report, and return 2 if there is an error in it."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the verdict says it
    folder = Path(options.folder)
    output = _output(folder, options)
    _check_numbers(options)
    backbone = _backbone(options)
    with _progress("inspecting") as report:
        survey = take_survey(folder, options.workers or WORKERS, report)
    features = None
    if backbone is not None:
        with _progress("computing features") as report:
            features = _features(backbone, survey, report)
    audit = examine(survey, features, f"the features of {options.backbone}")
    counts = count_images(survey)
    found = find_problems(audit, counts, options.suspects)
    lines = manifest_lines(audit)
    page = render_page(audit, counts, found, options.suspects, lambda row: thumbnail(survey.path(row)))
    data = json.dumps(summarise(audit, counts, found, lines), indent=1, allow_nan=False) + "\n"
    _write(output, (lines, data.encode(), page.encode()))
    _show(survey, counts, found)
    for name in FILES:
        print(f"{printable(str(output / name))} ({(output / name).stat().st_size / 1000:.0f} kB)")
    return WRONG if any(finding.severity == "error" for finding in found) else CLEAN


def _output(folder: Path, options: argparse.Namespace) -> Path:
    output = Path(options.output or f"check-{printable(folder.resolve().name)}")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ModmetaError(f"the output {output} lies in the folder to check; choose another with --output")
    if not output.resolve().parent.is_dir():
        raise ModmetaError(f"--output {output}: the folder {output.resolve().parent} does not exist")
    if output.exists() and not output.is_dir():
        raise ModmetaError(f"--output {output} is a file; name a folder")
    if not os.access(output if output.is_dir() else output.resolve().parent, os.W_OK):
        raise ModmetaError(f"--output {output}: no right to write there; choose another folder")
    for name in FILES:
        if (output / name).exists() and not options.overwrite:
            raise ModmetaError(f"{output / name} exists; choose another --output or add --overwrite")
    return output


def _check_numbers(options: argparse.Namespace) -> None:
    if options.suspects < 0:
        raise ModmetaError(f"--suspects must be 0 or more, got {options.suspects}")
    if options.workers is not None and options.workers < 1:
        raise ModmetaError(f"--workers must be 1 or more, got {options.workers}")
    if options.accelerator == "cuda" and not torch.cuda.is_available():
        raise ModmetaError("--accelerator cuda: this machine has no usable GPU; leave the option out")


def _backbone(options: argparse.Namespace) -> Backbone | None:
    if options.backbone is None:
        return None
    pretrained = True if options.pretrained == "true" else options.pretrained
    return Backbone(options.backbone, pretrained, options.image_size).to(options.accelerator)


@torch.no_grad()
def _features(backbone: Backbone, survey: Survey, report: Callable[[int, int], None]) -> np.ndarray:
    paths = [survey.path(row) for row in survey.good]
    features = np.empty((len(paths), backbone.feature_dim), np.float32)
    for begin in range(0, len(paths), _BATCH):
        some = paths[begin : begin + _BATCH]
        images = torch.stack([decode_image(path, backbone.image_size) for path in some])
        features[begin : begin + len(some)] = backbone.run(backbone.prepare(images)).cpu().numpy()
        report(begin + len(some), len(paths))
    return features


def _write(output: Path, contents: Sequence[bytes]) -> None:
    output.mkdir(exist_ok=True)
    for name, content in zip(FILES, contents, strict=True):
        write_atomically(output / name, content)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on the terminal's error stream, and nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show(survey: Survey, counts: Balance, found: Sequence[Finding]) -> None:
    screen = console()
    bad = len(survey.inspections) - len(survey.good)
    layout = "one domain, class/image" if survey.single else "domain/class/image"
    screen.print(
        Text(f"{len(survey.inspections):,} image files ({layout}): {len(survey.good):,} good, {bad:,} quarantined")
    )
    screen.print(_domain_table(counts))
    screen.print(_class_table(counts))
    for finding in found:
        screen.print(Text(f"{finding.severity}: {finding.line}", style=_STYLES[finding.severity]), soft_wrap=True)
        for case in finding.cases[:_SHOWN_CASES]:
            screen.print(Text(f"  {printable(case)}"), soft_wrap=True)
        if len(finding.cases) > _SHOWN_CASES:
            screen.print(Text(f"  and {len(finding.cases) - _SHOWN_CASES:,} more", style="dim"))
    kinds = [finding.severity for finding in found]
    screen.print(Text(f"{kinds.count('error')} kinds of errors, {kinds.count('warning')} kinds of warnings"))


def _domain_table(counts: Balance) -> Table:
    table = Table(title="domains")
    for heading in ("domain", "images", "classes", "smallest class", "largest class", "ratio"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for domain in counts.domains:
        sizes = counts.of_domain(domain)
        by_size = sorted(sizes, key=sizes.__getitem__)
        ends = [Text(f"{printable(name)} {sizes[name]:,}") for name in by_size[:1] + by_size[-1:]] or [Text("-")] * 2
        ratio = counts.ratio(domain)
        shown = "-" if ratio is None else f"{ratio:.1f}"
        table.add_row(Text(printable(domain)), f"{sum(sizes.values()):,}", f"{len(sizes):,}", *ends, shown)
    return table


def _class_table(counts: Balance) -> Table:
    domains, classes = counts.domains[:_SHOWN_DOMAINS], counts.classes[:_SHOWN_CLASSES]
    left = len(counts.classes) - len(classes), len(counts.domains) - len(domains)
    table = Table(
        title="good images", caption=f"and {left[0]:,} classes and {left[1]:,} domains more" if any(left) else None
    )
    table.add_column("class")
    for domain in (*domains, "all"):
        table.add_column(Text(printable(domain)), justify="right")
    for name in classes:
        numbers = [counts.counts[domain, name] for domain in counts.domains]
        cells = [f"{number:,}" for number in numbers[: len(domains)]]
        table.add_row(Text(printable(name)), *cells, f"{sum(numbers):,}")
    return table
