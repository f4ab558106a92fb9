"""Does a support show that its labels are wrong? What a wary head makes of right labels, and of some that are not.

    python benchmarks/label_trust.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt

For every support of the domain that a checkpoint was not trained on: the share of its labels that the checkpoint's head
takes for wrong, judging every image by a head that has not seen it, with the labels as they are and with a fifth of
them turned into other classes; mean and standard deviation over episodes, and the share of the pairs of a right and
a spoiled support that it ranks the right way (area under the ROC curve); seed 0. Nothing is adapted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from modmeta.adaptation import Support
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.evaluation.compare.runner import with_wrong_labels
from modmeta.learners import MetaLearner, load_learner
from modmeta.learners.measuring import episode_support

SHARE = 0.2


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
        "| domain | shots | right labels, % taken for wrong | a fifth wrong, % taken for wrong | pairs told apart, % |"
    )
    print("|---|---|---|---|---|")
    for each in options.checkpoints:
        domain, _, path = each.partition("=")
        learner = load_learner(path)
        size = learner.model.backbone.image_size
        data = DomainDataModule(
            options.root, test_domains=[domain], image_size=size, eval_shots=options.shots,
            test_episodes=options.episodes, cache_dir=options.cache_dir,
        )  # fmt: skip
        data.setup("test")
        found: dict[int, list[tuple[float, float]]] = {shots: [] for shots in options.shots}
        for index in range(options.episodes * len(options.shots)):
            episode = data.episode("test", index)
            right = episode_support(episode, hide=False)
            spoiled = with_wrong_labels(right, SHARE, rng(0, "flipped labels", domain, index))
            found[episode.shots].append((doubt(learner, right), doubt(learner, spoiled)))
        for shots, pairs in found.items():
            clean, wrong = 100 * np.asarray(pairs).T
            apart = 100 * np.mean(clean[:, None] < wrong)
            cells = [f"{each.mean():.1f} ± {each.std(ddof=1):.1f}" for each in (clean, wrong)]
            print(f"| {domain} | {shots} | {cells[0]} | {cells[1]} | {apart:.0f} |", flush=True)


def doubt(learner: MetaLearner, support: Support) -> float:
    """Return the expected share of wrong labels."""
    found = learner.wrong_labels(learner.prior_features(support.images), support)
    if not found:
        raise ModmetaError(
            "the checkpoint's head takes every label at its word, or does not know the classes beforehand"
        )
    return found["expected"]


if __name__ == "__main__":
    main()
