"""What a support set can tell about the gain of adapting: forecasts and evidence beside what the query says.

    python benchmarks/veto_evidence.py --root PACS --checkpoints sketch=sketch.ckpt photo=photo.ckpt --folds 2

Every checkpoint is tried on the domain that it was not trained on: each candidate plan is carried out on the whole
support, and its gain on the query is set beside the policy's forecast and beside the gain on held-out support images,
as the veto measures it. Correlations are over the episodes of all domains; 95 % intervals are percentiles of the
bootstrap over episodes, seed 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from modmeta.adaptation import Trial
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.learners import ModularMetaLearner, load_learner

RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="DOMAIN=CKPT")
    parser.add_argument("--episodes", type=int, default=10, help="per domain")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--cache_dir", type=Path)
    options = parser.parse_args()
    quiet()
    trials: list[Trial] = []
    for each in options.checkpoints:
        domain, _, path = each.partition("=")
        own = try_out(domain, path, options)
        trials += own
        gains = [trial.gains["plan"] for trial in own if "plan" in trial.gains]
        forecasts = [trial.forecast for trial in own]
        print(f"{domain}: forecast {np.mean(forecasts):+.3f} nats, gain of the plan {np.mean(gains):+.3f}", flush=True)
    print(table(trials))


def try_out(domain: str, path: str, options: argparse.Namespace) -> list[Trial]:
    learner = load_learner(path)
    assert isinstance(learner, ModularMetaLearner)
    learner.veto_folds = options.folds
    size = learner.model.backbone.image_size
    data = DomainDataModule(
        options.root, test_domains=[domain], image_size=size, eval_shots=[options.shots], queries=8,
        test_episodes=options.episodes, cache_dir=options.cache_dir,
    )  # fmt: skip
    data.setup("test")
    learner.keep_features(data.store)
    return [learner.trial(data.episode("test", index)) for index in range(options.episodes)]


def table(trials: list[Trial]) -> str:
    lines = ["", "| plan | what is known | mean, nats | gain on the query, nats | correlation | episodes |"]
    lines.append("|---|---|---|---|---|---|")
    for name in ("statistics", "plan/3", "plan"):
        for kind in ("forecast", "evidence"):
            rows = [
                (trial.forecast if kind == "forecast" else trial.evidence[name], trial.gains[name])
                for trial in trials
                if name in trial.gains and (kind == "forecast" or name in trial.evidence)
            ]
            if len(rows) > 2:
                known, gain = np.array(rows).T
                lines.append(
                    f"| {name} | {kind} | {known.mean():+.3f} | {gain.mean():+.3f} | {correlation(known, gain)} "
                    f"| {len(rows)} |"
                )
    return "\n".join(lines)


def correlation(x: np.ndarray, y: np.ndarray) -> str:
    random = np.random.default_rng(0)
    picks = random.integers(len(x), size=(RESAMPLES, len(x)))
    found = [np.corrcoef(x[pick], y[pick])[0, 1] for pick in picks if np.ptp(x[pick]) and np.ptp(y[pick])]
    low, high = np.percentile(found, [2.5, 97.5])
    return f"{np.corrcoef(x, y)[0, 1]:+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    main()
