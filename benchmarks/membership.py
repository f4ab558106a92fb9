"""Does an adapter file tell which images it was adapted to? Membership inference, and what privacy costs.

    python benchmarks/membership.py
    python benchmarks/membership.py --checkpoint runs/quickstart/version_0/checkpoints/last.ckpt
    python benchmarks/membership.py --checkpoint pacs.ckpt --root PACS --domain sketch --ways 7

Many adapters are made of random supports out of one pool of images of a domain that the checkpoint was not trained on.
An attacker has the backbone, one adapter and labelled images of the pool, half of which or fewer were its support.

- loss: an image counts as a member the lower its loss under the adapter is (Yeom et al., CSF 2018).
- shadow: the attacker also has adapters of his own, made of the same pool with and without the image, and compares how
  likely either sort gives this loss (Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022).
  The other adapters serve as his.

AUC is 0.5 where nothing leaks and 1 where everything does. TPR is the share of members found at a false alarm per
hundred other images. Accuracy is measured on images of the domain outside of the pool. Intervals of 95 % are
percentiles of the bootstrap over adapters. Writes ``results.json`` and ``table.md``. Without a checkpoint,
``configs/quickstart.yaml`` is fitted first (seed 0).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from modmeta.adaptation import Adapted, Support
from modmeta.adaptation.private import Privacy
from modmeta.cli import main as modmeta
from modmeta.commands.quiet import quiet
from modmeta.data import DigitsDomains, DomainFolder, ImageStore
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.files import write_atomically
from modmeta.learners import MetaLearner, ModularMetaLearner, load_learner
from modmeta.learners.private import adapt_privately

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
MANY_STEPS, RATE = 50, 0.02
RESAMPLES = 1000

Adapt = Callable[[Support, np.random.Generator], Adapted]


@dataclass(frozen=True)
class Trials:
    """What an attacker sees of ``A`` adapters of one system.

    Attributes:
        member: ``(A, N)`` bool, whether image ``n`` of the pool was in the support of adapter ``a``.
        confidence: ``(A, N)``, log odds of the image's own class under the adapter.
        accuracy: ``(A,)``, on images outside of the pool.
    """

    member: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", help="a fitted ModularMetaLearner; default: fit configs/quickstart.yaml")
    parser.add_argument("--root", default="digits", help="a folder domain/class/image, or digits")
    parser.add_argument("--domain", default="paper", help="one that the checkpoint was not trained on")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[math.inf, 8.0, 3.0, 1.0])
    parser.add_argument("--adapters", type=int, default=32, help="per system and number of shots")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/membership"))
    options = parser.parse_args()
    begin = time.perf_counter()
    try:
        rows = run(options)
    except ModmetaError as error:
        sys.exit(f"error: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "results.json", (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())
    text = table(rows, options)
    write_atomically(options.output / "table.md", text.encode())
    print(text)
    print(f"{(time.perf_counter() - begin) / 60:.1f} minutes")


def run(options: argparse.Namespace) -> list[dict]:
    quiet()
    learner = load_learner(options.checkpoint or fitted())
    if not isinstance(learner, ModularMetaLearner):
        raise ModmetaError(f"give the checkpoint of a ModularMetaLearner, not of a {type(learner).__name__}")
    if options.domain in learner.sources.domains:
        raise ModmetaError(f"the checkpoint was trained on {options.domain!r}; choose another --domain")
    size = learner.model.backbone.image_size
    store = DigitsDomains(size) if options.root == "digits" else DomainFolder(options.root, size)
    rows = []
    for shots in options.shots:
        for name, adapt in systems(learner, options.epsilons).items():
            found = trials(learner, adapt, store, shots, options)
            rows += measured(found, {"system": name, "domain": options.domain, "shots": shots}, options.seed)
            print(f"{shots} shots, {name}: done", file=sys.stderr)
    return rows


def fitted() -> Path:
    words = ["--config", str(QUICKSTART), "--name", "membership", "--seed_everything", "0", "--test_after_fit", "false"]
    if modmeta(["fit", *words]):
        raise ModmetaError("the fit of configs/quickstart.yaml failed")
    runs = Path("runs/membership").glob("version_*/checkpoints/last.ckpt")
    return max(runs, key=lambda path: path.stat().st_mtime)


def systems(learner: ModularMetaLearner, epsilons: list[float]) -> dict[str, Adapt]:
    def source(support: Support) -> Adapted:
        head = learner.sources.view().classifier(support.classes)
        return Adapted(learner.bank.initial(), learner.idle_plan(), head, support.classes)

    found: dict[str, Adapt] = {
        "source classifier (no support)": lambda support, random: source(support),
        "head only": lambda support, random: MetaLearner.adapt(learner, support),
        "policy": lambda support, random: learner.adapt(support),
        f"all units, {MANY_STEPS} steps": lambda support, random: many_steps(learner, support),
    }

    def private(epsilon: float) -> Adapt:
        return lambda support, random: adapt_privately(learner, support, Privacy(epsilon), random)

    names = {math.inf: "private path without noise"}
    return found | {names.get(e, f"private, epsilon {e:g}"): private(e) for e in epsilons}


def many_steps(learner: ModularMetaLearner, support: Support) -> Adapted:
    """Open every unit that learns, and take many steps: what a careless user would do."""
    idle = learner.idle_plan()
    count = len(idle.units)
    plan = replace(idle, gates=torch.ones(count), rates=torch.full((count, MANY_STEPS), RATE))
    plan = plan.keeping([unit.name for unit in learner.model.units if unit.learns and not unit.reads])
    state, _ = learner.carry_out(plan, support)
    features = learner.model(support.images, state, plan.gate_of())
    return Adapted(state, plan, learner.fit_head(features, support), support.classes)


@torch.no_grad()
def trials(
    learner: ModularMetaLearner, adapt: Adapt, store: ImageStore, shots: int, options: argparse.Namespace
) -> Trials:
    classes, pool, rest = split(store, shots, options)
    labels = torch.arange(len(classes)).repeat_interleave(pool.shape[1])
    images, others = store.load(pool.flatten()), store.load(np.concatenate(rest))
    truth = torch.cat([torch.full((len(rows),), label) for label, rows in enumerate(rest)])
    member = np.zeros((options.adapters, pool.size), dtype=bool)
    confidence, accuracy = np.zeros(member.shape), np.zeros(options.adapters)
    for a in range(options.adapters):
        # The same supports for every system; the noise of a private one is its own.
        draw = rng(options.seed, "membership", shots, a)
        for c in range(len(classes)):
            member[a, c * pool.shape[1] + draw.permutation(pool.shape[1])[:shots]] = True
        chosen = torch.from_numpy(member[a])
        adapted = adapt(Support(images[chosen], labels[chosen], classes), rng(options.seed, "noise", shots, a))
        confidence[a] = log_odds(learner.logits(adapted, images), labels).numpy()
        accuracy[a] = float((learner.logits(adapted, others).argmax(1) == truth).double().mean())
    return Trials(member, confidence, accuracy)


def split(
    store: ImageStore, shots: int, options: argparse.Namespace
) -> tuple[tuple[str, ...], np.ndarray, list[np.ndarray]]:
    """Return the classes, the pool ``(C, n)`` that supports are drawn from, and the other rows of each class."""
    size = max(10, 2 * shots)
    classes = store.classes_of(options.domain)[: options.ways]
    pool, rest = [], []
    for name in classes:
        rows = rng(options.seed, "pool", name).permutation(store.ids(options.domain, name))
        if len(rows) <= size:
            raise ModmetaError(f"{options.domain}: {shots} shots need over {size} images of class {name!r}")
        pool.append(rows[:size])
        rest.append(rows[size : size + 100])
    return tuple(classes), np.stack(pool), rest


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``log(p / (1 - p))`` of the labels' probabilities; it is nearly normal, and never saturates."""
    own = logits.double().gather(1, labels[:, None])[:, 0]
    others = logits.double().scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return own - others


def shadow_scores(found: Trials) -> np.ndarray:
    """Return log likelihood ratios ``(A, N)``, each from the other adapters, with one variance for either sort."""
    scores = np.empty_like(found.confidence)
    for a in range(len(scores)):
        member, confidence = np.delete(found.member, a, 0), np.delete(found.confidence, a, 0)
        mean = {}
        for inside in (True, False):
            taken = member == inside
            count = taken.sum(0)
            mean[inside] = np.where(count > 0, (confidence * taken).sum(0) / np.maximum(count, 1), np.nan)
        gap = np.nanmean(mean[True] - mean[False])
        # An image that no shadow has, or that all have, is taken to move as the others do on average.
        mean = {
            True: np.where(np.isnan(mean[True]), mean[False] + gap, mean[True]),
            False: np.where(np.isnan(mean[False]), mean[True] - gap, mean[False]),
        }
        centred = confidence - np.where(member, mean[True], mean[False])
        terms = {}
        for inside in (True, False):
            deviation = max(float(centred[member == inside].std()), 1e-6)
            terms[inside] = -0.5 * ((found.confidence[a] - mean[inside]) / deviation) ** 2 - math.log(deviation)
        scores[a] = terms[True] - terms[False]
    return scores


def auc_and_tpr(scores: np.ndarray, member: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve, and the share of members found at one false alarm per hundred others."""
    inside, outside = scores[member], scores[~member]
    ranks = rankdata(np.concatenate([inside, outside]))
    area = (ranks[: len(inside)].sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside))
    bar = np.sort(outside)[::-1][int(0.01 * len(outside))]
    return float(area), float((inside > bar).mean())


def measured(found: Trials, key: dict, seed: int) -> list[dict]:
    count = len(found.member)
    draws = rng(seed, "bootstrap").integers(count, size=(RESAMPLES, count))
    rows = []
    for attack, scores in (("loss", found.confidence), ("shadow", shadow_scores(found))):
        values = auc_and_tpr(scores, found.member)
        resampled = np.array([auc_and_tpr(scores[draw], found.member[draw]) for draw in draws])
        for metric, value, column in zip(("auc", "tpr"), values, resampled.T, strict=True):
            rows.append(key | {"metric": f"{attack} {metric}"} | with_interval(value, column, count))
    value, column = float(found.accuracy.mean()), found.accuracy[draws].mean(1)
    return [*rows, key | {"metric": "accuracy"} | with_interval(value, column, count)]


def with_interval(value: float, resampled: np.ndarray, count: int) -> dict:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high), "adapters": count}


def table(rows: list[dict], options: argparse.Namespace) -> str:
    metrics = ("loss auc", "loss tpr", "shadow auc", "shadow tpr", "accuracy")
    lines = [
        f"Domain {options.domain}, {options.ways} ways, {options.adapters} adapters per row, seed {options.seed}; 95 % "
        f"intervals over adapters. TPR at 1 % FPR and accuracy in %.",
        "",
        "| shots | adaptation | loss: AUC | loss: TPR | shadow: AUC | shadow: TPR | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {(row["shots"], row["system"], row["metric"]): row for row in rows}
    for shots, system in dict.fromkeys((row["shots"], row["system"]) for row in rows):
        cells = []
        for metric in metrics:
            row = found[shots, system, metric]
            factor, digits = (1, 2) if metric.endswith("auc") else (100, 1)
            value, low, high = (f"{factor * row[part]:.{digits}f}" for part in ("value", "low", "high"))
            cells.append(f"{value} [{low}, {high}]")
        lines.append(f"| {shots} | {system} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
