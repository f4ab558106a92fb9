"""How much of the answer is to be the unadapted model's in near domains? Gain and harm by threshold and share.

    python benchmarks/near_domains.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt --shots 1 5

Every checkpoint adapts to each support of the domain that it was not trained on, and the answer is weighed anew.
Below the threshold of the unadapted model's mean loss on held-out support images the unadapted model has the share of
the table's row, elsewhere and in the first row one half: mean gain over the unadapted model in points of accuracy
with its 95 % bootstrap interval, and the episodes that end more than a point below it. In the last row, which is what
the learner does, images whose label looks wrong judge no statistics below the threshold, either. Supports have right
labels and, with --wrong, that share of wrong ones. Seed 1, so that no episode of the comparisons is used up.
"""

from __future__ import annotations

import torch
from held_back import accuracy, arguments, episodes, gain_and_harm

from modmeta.adaptation import Support
from modmeta.commands.quiet import quiet
from modmeta.data import Episode
from modmeta.learners import ModularMetaLearner, load_learner
from modmeta.learners.measuring import episode_ids

ELSEWHERE = 0.5
SHARES = [(0.0, ELSEWHERE), *((loss, share) for loss in (0.3, 0.35, 0.4) for share in (0.6, 0.65, 0.7))]
CHOSEN = (0.35, 0.65)
RULES = [*(f"{loss:g} | {share:g}" for loss, share in SHARES), f"{CHOSEN[0]:g} | {CHOSEN[1]:g}, statistics"]


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--wrong", type=float, default=0.0, help="share of the support labels that are wrong")
    options = parser.parse_args()
    quiet()
    print("| domain | shots | near_loss | near_share | gain, points | harmed |")
    print("|---|---|---|---|---|---|")
    for each in options.checkpoints:
        domain, _, path = each.partition("=")
        learner = load_learner(path)
        assert isinstance(learner, ModularMetaLearner)
        learner.prior_share, learner.near_share = ELSEWHERE, CHOSEN[1]
        for shots in options.shots:
            found = [gains(learner, *one) for one in episodes(learner, domain, shots, options, options.wrong)]
            for rule, values in zip(RULES, zip(*found, strict=True), strict=True):
                print("| " + " | ".join(map(str, (domain, shots, rule, *gain_and_harm(values)))) + " |", flush=True)


def gains(learner: ModularMetaLearner, episode: Episode, support: Support) -> list[float]:
    """Return the gain over the unadapted model by each rule."""
    _, ids = episode_ids(episode)
    prior = learner.fit_head(learner.prior_features(support.images), support)
    before = prior(learner.prior_features(episode.query, ids))
    learner.near_loss = 0.0
    adapted = learner.adapt(support)
    loss = adapted.report["unadapted_loss"]
    answer = learner.logits(adapted, episode.query, ids)
    # Where the veto kept the prior, both are the same.
    after = before if adapted.prior is None else (answer - ELSEWHERE * before) / (1 - ELSEWHERE)
    answers = [torch.lerp(after, before, share if loss < threshold else ELSEWHERE) for threshold, share in SHARES]
    learner.near_loss = CHOSEN[0]
    answers.append(learner.logits(learner.adapt(support), episode.query, ids))
    return [accuracy(each, episode) - accuracy(before, episode) for each in answers]


if __name__ == "__main__":
    main()
