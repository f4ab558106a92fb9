"""How much of the answer is to be the unadapted model's in near domains? Gain and harm by threshold and share.

    python benchmarks/near_domains.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt --shots 1 5

Every checkpoint adapts to each support of the domain that it was not trained on, and the answer is weighed anew.
Below the threshold of the unadapted model's mean loss on held-out support images the unadapted model has the share of
the table's row, elsewhere and in the first row one half: mean gain over the unadapted model in points of accuracy
with its 95 % bootstrap interval, and the episodes that end more than a point below it. In the rows of statistics images
whose label looks wrong judge none below the threshold, either. In the rows of images, the last of which is what the
learner does, the unadapted model moreover has the share that they name where a class has no image to believe in and the
images' early shift is below 0.07. Supports have right labels and, with --wrong, that share of wrong ones; then four
more rows have the episodes whose wrong labels are all left out of what is learned from, and the others. Seed 1 unless
told otherwise, so that no episode of the comparisons is used up.
"""

from __future__ import annotations

import torch
from held_back import accuracy, arguments, cells, episodes, gain_and_harm, unadapted
from label_trust import judged

from modmeta.adaptation import Support
from modmeta.commands.quiet import quiet
from modmeta.data import Episode
from modmeta.learners import ModularMetaLearner
from modmeta.learners.measuring import episode_ids, episode_support

ELSEWHERE = 0.5
SHARES = [(0.0, ELSEWHERE), *((loss, share) for loss in (0.3, 0.35, 0.4) for share in (0.6, 0.65, 0.7))]
CHOSEN = (0.35, 0.65)
RULES = [f"{loss:g} | {share:g}" for loss, share in SHARES]
NEAR_SHIFT, LACKING = 0.07, (0.65, 0.7, 0.8, 0.75)  # the last one is the learner's
RULES += [f"{CHOSEN[0]:g} | {CHOSEN[1]:g}, statistics{name}" for name in ("", *(f", images {x:g}" for x in LACKING))]
LEFT_OUT, LEARNED_FROM = "all wrong labels left out", "some learned from"
PARTED = (len(SHARES), -1)  # statistics alone, and the learner's


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--wrong", type=float, default=0.0, help="share of the support labels that are wrong")
    options = parser.parse_args()
    quiet()
    print("| domain | shots | near_loss | near_share | gain, points | harmed |")
    print("|---|---|---|---|---|---|")
    for domain, shots, learner in cells(options):
        learner.prior_share, learner.near_share, learner.lacking_share = ELSEWHERE, CHOSEN[1], LACKING[-1]
        found: list[list[float]] = []
        parts: dict[str, list[list[float]]] = {LEFT_OUT: [], LEARNED_FROM: []}
        for episode, support in episodes(learner, domain, shots, options, options.wrong):
            found.append(gains(learner, episode, support))
            if options.wrong:
                labels = judged(learner, support, episode_support(episode, hide=False))
                parts[LEARNED_FROM if labels.wrong[labels.trust.believed].any() else LEFT_OUT].append(found[-1])
        table = list(zip(RULES, zip(*found, strict=True), strict=True))
        for name, own in parts.items():
            table += [(f"{RULES[row]}, {len(own)} with {name}", [each[row] for each in own]) for row in PARTED if own]
        for rule, values in table:
            print("| " + " | ".join(map(str, (domain, shots, rule, *gain_and_harm(values)))) + " |", flush=True)


def gains(learner: ModularMetaLearner, episode: Episode, support: Support) -> list[float]:
    """Return the gain over the unadapted model by each rule."""
    _, ids = episode_ids(episode)
    before = unadapted(learner, episode, support)
    learner.near_loss = learner.near_shift = 0.0
    adapted = learner.adapt(support)
    loss = adapted.report["unadapted_loss"]
    answer = learner.logits(adapted, episode.query, ids)
    # Where the veto kept the prior, both are the same.
    after = before if adapted.prior is None else (answer - ELSEWHERE * before) / (1 - ELSEWHERE)
    answers = [torch.lerp(after, before, share if loss < threshold else ELSEWHERE) for threshold, share in SHARES]
    learner.near_loss, learner.near_shift = CHOSEN[0], NEAR_SHIFT
    adapted = learner.adapt(support)
    answer, share = learner.logits(adapted, episode.query, ids), adapted.report["unadapted_share"]
    after = before if adapted.prior is None else (answer - share * before) / (1 - share)
    by_loss = CHOSEN[1] if learner.is_near(loss) else ELSEWHERE
    near_by_images = share == learner.lacking_share
    answers += [torch.lerp(after, before, each if near_by_images else by_loss) for each in (by_loss, *LACKING)]
    return [accuracy(each, episode) - accuracy(before, episode) for each in answers]


if __name__ == "__main__":
    main()
