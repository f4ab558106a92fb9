"""Does a support show that its labels are wrong? What a wary head makes of right labels, and of some that are not.

    python benchmarks/label_trust.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt --shots 1 5 10

For every support of the domain that a checkpoint was not trained on, with the labels as they are and with a fifth of
them turned into other classes: the share of its labels that the checkpoint's head takes for wrong, judging every image
by a head that has not seen it (mean and standard deviation over episodes); the shares of the right and of the wrong
labels from which nothing is learned; the mean factor on the learning rates; the share of the pairs of a right and
a spoiled support whose trust is ranked the right way (area under the ROC curve); and the share of supports that count
as near, by the unadapted model's mean loss on held-out images whose label is believed. Nothing is adapted. Seed 1
unless told otherwise, so that no episode of the comparisons is used up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from held_back import SHARE, arguments, cells, episodes

from modmeta.adaptation import LabelTrust, Support
from modmeta.commands.quiet import quiet
from modmeta.errors import ModmetaError
from modmeta.learners import ModularMetaLearner
from modmeta.learners.held_out import HeldOut
from modmeta.learners.measuring import episode_support


class Judged(NamedTuple):
    """What the head makes of the labels, which of them are wrong ``(S,)``, and whether the domain counts as near."""

    trust: LabelTrust
    wrong: torch.Tensor
    near: bool


@torch.no_grad()
def main() -> None:
    options = arguments(__doc__).parse_args()
    quiet()
    print(
        "| domain | shots | labels | taken for wrong, % | right ones left out, % | wrong ones left out, % | "
        "factor on rates | pairs told apart, % | near, % |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for domain, shots, learner in cells(options):
        pairs = []
        for episode, spoiled in episodes(learner, domain, shots, options, SHARE):
            right = episode_support(episode, hide=False)
            pairs.append((judged(learner, right, right), judged(learner, spoiled, right)))
        print("\n".join(rows(domain, shots, pairs)), flush=True)


def judged(learner: ModularMetaLearner, support: Support, right: Support) -> Judged:
    """Judge a support whose labels may be wrong by the checkpoint's head."""
    features = learner.prior_features(support.images)
    trust = learner.wrong_labels(features, support)
    if trust is None or support.labels is None or right.labels is None:
        raise ModmetaError(
            "the checkpoint's head takes every label at its word, or does not know the classes beforehand"
        )
    loss = HeldOut(learner, support, features).unadapted_loss(trust.believed)
    return Judged(trust, support.labels != right.labels, learner.is_near(loss))


def rows(domain: str, shots: int, pairs: list[tuple[Judged, Judged]]) -> list[str]:
    trusts = np.asarray([[each.trust.trust for each in pair] for pair in pairs])  # (episodes, 2): right and spoiled
    apart = 100 * np.mean(trusts[:, None, 0] > trusts[None, :, 1])
    lines = []
    for row, labels in enumerate(("right", "a fifth wrong")):
        mine = [pair[row] for pair in pairs]
        expected = 100 * np.asarray([each.trust.expected for each in mine])
        left_out = torch.cat([~each.trust.believed for each in mine])
        wrong = torch.cat([each.wrong for each in mine])
        caught = f"{100 * left_out[wrong].float().mean():.0f}" if wrong.any() else "-"
        lines.append(
            f"| {domain} | {shots} | {labels} | {expected.mean():.1f} ± {expected.std(ddof=1):.1f} | "
            f"{100 * left_out[~wrong].float().mean():.1f} | {caught} | "
            f"{np.mean([each.trust.learning for each in mine]):.2f} | {apart:.0f} | "
            f"{100 * np.mean([each.near for each in mine]):.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
