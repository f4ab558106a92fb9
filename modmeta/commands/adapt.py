"""``adapt``: from a checkpoint and a folder of images to an adapter file and its card."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from modmeta.adaptation import Adapted, Support
from modmeta.adaptation.private import Privacy
from modmeta.adapters.adapter_file import write_adapter
from modmeta.commands.images import find_images, load_images
from modmeta.commands.load import load
from modmeta.commands.quiet import quiet
from modmeta.data.decode import printable
from modmeta.errors import ModmetaError
from modmeta.evaluation.abstention import abstention_sentence, calibrate_abstention
from modmeta.evaluation.card import card_table, make_card, provenance, write_card
from modmeta.evaluation.explanation import explain, explanation_tables
from modmeta.evaluation.terminal import console
from modmeta.learners import MetaLearner
from modmeta.learners.private import adapt_privately


def run(options: argparse.Namespace) -> int:
    """Adapt, and write what comes of it."""
    quiet()
    output = Path(options.output)
    _check_output(output, options.overwrite, (".md", ".json", ".png") if options.explain else (".md", ".json"))
    privacy = _privacy(options)
    learner = load(options)
    if options.explain and not learner.model.units:
        raise ModmetaError(f"--explain: the {type(learner).__name__} of this checkpoint has no units to explain")
    if options.budget is not None:
        _set_budget(learner, options.budget)
    if options.abstain_target is not None and not 0 <= options.abstain_target <= 1:
        raise ModmetaError(f"--abstain-target must lie in 0..1, got {options.abstain_target}")
    support = read_support(Path(options.support), learner, options.domain)
    begin = time.perf_counter()
    with torch.no_grad():  # adaptation switches gradients on where it needs them
        adapted = learner.adapt(support) if privacy is None else adapt_privately(learner, support, privacy)
    seconds = time.perf_counter() - begin
    level = options.provenance or ("hashes" if privacy is None else "none")
    origin = provenance(support, level, _names(Path(options.support)) if level == "full" else ())
    if privacy is not None:
        origin["privacy"] = adapted.report["privacy"]
    if options.abstain_target is not None:
        with torch.no_grad():
            origin["abstention"] = calibrate_abstention(learner, support, options.abstain_target)
    write_adapter(output, learner.model, adapted.to_file(origin))
    card = make_card(learner, support, adapted, seconds, origin)
    if options.explain:
        card["explanation"] = explain(learner, support, adapted, card["units"])
    files = write_card(output, card)
    console().print(card_table(card))
    if options.explain:
        for table in explanation_tables(card["explanation"]):
            console().print(table)
    print(card["decision"])
    if support.labels is None:
        print(_without_labels(learner, adapted))
    if "abstention" in origin:
        print(abstention_sentence(origin["abstention"]))
    for file in (output, *files):
        print(f"{file} ({file.stat().st_size / 1000:.0f} kB)")
    return 0


def read_support(folder: Path, learner: MetaLearner, domain: str | None = None) -> Support:
    """Read labelled images from folders ``class/image``, or unlabelled ones from a flat folder.

    Raises:
        ModmetaError: if the folder is missing, empty, both at once, has a single class or one without images.
    """
    paths = find_images(folder)
    device, size = learner.device, learner.model.backbone.image_size
    places = [path.relative_to(folder).parts[:-1] for path in paths]
    flat = [path for path, place in zip(paths, places, strict=True) if not place]
    if flat and len(flat) < len(paths):
        raise ModmetaError(
            f"the support folder {folder} holds images beside class folders, such as {flat[0].name}; "
            f"sort all of them into classes, or none"
        )
    images = load_images(paths, size).to(device)
    if flat:
        return Support(images, None, learner.sources.classes, domain)
    classes = tuple(sorted({place[0] for place in places}))
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.name not in classes:
            raise ModmetaError(f"the class folder {path} holds no image; put some into it, or remove it")
    if len(classes) < 2:
        raise ModmetaError(f"the support folder {folder} has one class, {classes[0]!r}; give two or more")
    labels = torch.tensor([classes.index(place[0]) for place in places], device=device)
    return Support(images, labels, classes, domain)


def _check_output(output: Path, overwrite: bool, beside: Sequence[str]) -> None:
    if output.suffix != ".safetensors":
        raise ModmetaError(f"--output {output} should end with .safetensors")
    if not output.parent.is_dir():
        raise ModmetaError(f"--output {output}: the folder {output.parent} does not exist")
    for file in (output, *map(output.with_suffix, beside)):
        if file.exists() and not overwrite:
            raise ModmetaError(f"--output: {file} exists; choose another name or add --overwrite")


def _privacy(options: argparse.Namespace) -> Privacy | None:
    if options.epsilon is None:
        for name in ("delta", "clip"):
            if getattr(options, name) is not None:
                raise ModmetaError(f"--{name} belongs to a private adaptation; give --epsilon, too")
        return None
    if options.epsilon == math.inf:
        raise ModmetaError("--epsilon inf promises nothing; leave it out")
    for name in ("explain", "abstain_target"):
        if getattr(options, name) not in (None, False):
            raise ModmetaError(
                f"--{name.replace('_', '-')} looks at the images without noise; leave it or --epsilon out"
            )
    if options.provenance not in (None, "none"):
        raise ModmetaError(
            f"--provenance {options.provenance} would tell which images an adaptation with --epsilon saw; leave it out"
        )
    given = {name: getattr(options, name) for name in ("delta", "clip") if getattr(options, name) is not None}
    return Privacy(options.epsilon, **given)


def _names(folder: Path) -> list[str]:
    return [printable(path.relative_to(folder).as_posix()) for path in find_images(folder)]


def _set_budget(learner: MetaLearner, budget: float) -> None:
    if not 0 <= budget <= 1:
        raise ModmetaError(f"--budget must lie in 0..1, got {budget}")
    if not hasattr(learner, "budget"):
        raise ModmetaError(f"--budget: the learner {type(learner).__name__} of this checkpoint has no budget")
    setattr(learner, "budget", budget)  # noqa: B010


def _without_labels(learner: MetaLearner, adapted: Adapted) -> str:
    signals = bool(getattr(learner, "signals", ()))  # losses without labels, for units that learn
    able = [unit.name for unit in learner.model.units if signals or (unit.reads and not unit.learns)]
    used = [unit.name for unit in learner.model.active(adapted.plan.gate_of())]
    return (
        "The images have no labels: only units that need none may act "
        f"({', '.join(able) or 'there is none'}); used: {', '.join(used) or 'none'}."
    )
