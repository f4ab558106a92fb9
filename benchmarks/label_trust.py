"""Does a support show that its labels are wrong? What a wary head makes of right labels, and of some that are not.

    python benchmarks/label_trust.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt

For every support of the domain that a checkpoint was not trained on, with the labels as they are and with a fifth of
them turned into other classes: the share of its labels that the checkpoint's head takes for wrong, judging every image
by a head that has not seen it (mean and standard deviation over episodes); the shares of the right and of the wrong
labels from which nothing is learned; the mean factor on the learning rates; and the share of the pairs of a right and
a spoiled support whose trust is ranked the right way (area under the ROC curve); seed 0. Nothing is adapted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from modmeta.adaptation import LabelTrust, Support
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.evaluation.compare.runner import with_wrong_labels
from modmeta.learners import MetaLearner, load_learner
from modmeta.learners.measuring import episode_support

SHARE = 0.2
Judged = tuple[LabelTrust, torch.Tensor]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="DOMAIN=CKPT")
    parser.add_argument("--episodes", type=int, default=30, help="per domain and number of shots")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--cache_dir", type=Path)
    options = parser.parse_args()
    quiet()
    print(
        "| domain | shots | labels | taken for wrong, % | right ones left out, % | wrong ones left out, % | "
        "factor on rates | pairs told apart, % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for each in options.checkpoints:
        domain, _, path = each.partition("=")
        learner = load_learner(path)
        size = learner.model.backbone.image_size
        data = DomainDataModule(
            options.root, test_domains=[domain], image_size=size, eval_shots=options.shots,
            test_episodes=options.episodes, cache_dir=options.cache_dir,
        )  # fmt: skip
        data.setup("test")
        found: dict[int, list[tuple[Judged, Judged]]] = {shots: [] for shots in options.shots}
        for index in range(options.episodes * len(options.shots)):
            episode = data.episode("test", index)
            right = episode_support(episode, hide=False)
            spoiled = with_wrong_labels(right, SHARE, rng(0, "flipped labels", domain, index))
            found[episode.shots].append((judged(learner, right, right), judged(learner, spoiled, right)))
        for shots, pairs in found.items():
            print("\n".join(rows(domain, shots, pairs)), flush=True)


def judged(learner: MetaLearner, support: Support, right: Support) -> Judged:
    """Return what the head makes of the labels, and which of them are wrong ``(S,)``."""
    found = learner.wrong_labels(learner.prior_features(support.images), support)
    if found is None or support.labels is None or right.labels is None:
        raise ModmetaError(
            "the checkpoint's head takes every label at its word, or does not know the classes beforehand"
        )
    return found, support.labels != right.labels


def rows(domain: str, shots: int, pairs: list[tuple[Judged, Judged]]) -> list[str]:
    trusts = np.asarray([[found.trust for found, _ in pair] for pair in pairs])  # (episodes, 2): right and spoiled
    apart = 100 * np.mean(trusts[:, None, 0] > trusts[None, :, 1])
    lines = []
    for row, labels in enumerate(("right", "a fifth wrong")):
        mine = [pair[row] for pair in pairs]
        expected = 100 * np.asarray([found.expected for found, _ in mine])
        left_out = torch.cat([~found.believed for found, _ in mine])
        wrong = torch.cat([wrong for _, wrong in mine])
        caught = f"{100 * left_out[wrong].float().mean():.0f}" if wrong.any() else "-"
        lines.append(
            f"| {domain} | {shots} | {labels} | {expected.mean():.1f} ± {expected.std(ddof=1):.1f} | "
            f"{100 * left_out[~wrong].float().mean():.1f} | {caught} | "
            f"{np.mean([found.learning for found, _ in mine]):.2f} | {apart:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
