"""Is the policy more than a constant, and what is it worth? Its decisions, and what is lost when they are replaced.

    python benchmarks/policy_evidence.py --config configs/quickstart.yaml --checkpoint last.ckpt --episodes 100

On frozen episodes of the test domains that the configuration names, held out of the checkpoint, all conditions paired:

- ``decisions``: how the policy's decisions vary between domains, numbers of shots and episodes, and which units it uses
  where. The other domains of the data serve beside the test domains, each hidden from what is known of the sources.
- ``shuffled``: the policy is told the indicators of another episode, of the same domain or of another one, with as many
  shots; or it plans what it plans on average over all test episodes; or, untrained, what the units' configuration says.
- ``flipped``: 20 % of the support labels, rounded, are turned into another class of the episode, seeded. Rivals are the
  closed-form heads. Harmed is an episode that ends more than a point below no adaptation, which is the learner's head
  on unadapted features, fitted to the same support.
- ``indicators``: each is switched off by setting its standardised numbers to zero, their mean over training episodes,
  as the policy's dropout of indicators does.

Writes ``results.json``, ``table.md`` and ``gates.png``. What was measured is kept in the folder, so a run that was
stopped goes on, and parts may follow one by one; the table holds those that were asked for last. Intervals are 95 %
percentiles of the bootstrap over episodes, seed 0.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from policy_conditions import NO_VETO, switched_off, tampered
from policy_decisions import Cell, decide_all, use_of_units, variation
from policy_tables import NONE, gates_plot, write_table

from modmeta.commands.arguments import Arguments
from modmeta.commands.fit import CommandLine
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule, ImageStore
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.evaluation.compare import Comparison, Place, RowFile, draw_manifest, read_manifest, run_comparison
from modmeta.evaluation.compare.figures import complete_rows, compute_results
from modmeta.evaluation.compare.settings import MEAN
from modmeta.evaluation.compare.statistics import episode_weights, interval
from modmeta.evaluation.results import write_results
from modmeta.evaluation.systems import HeadSystem, LearnerSystem, Source, System
from modmeta.files import write_atomically
from modmeta.learners import ModularMetaLearner, Result, load_learner

PARTS = ("decisions", "shuffled", "flipped", "indicators")
FLIPPED = 0.2
_AT_ONCE = 20  # episodes between two lines of progress


@dataclass(frozen=True)
class Evidence:
    """The frozen episodes and what was measured on them before.

    Attributes:
        learner: the fitted learner.
        store: the images.
        tested: episodes of the test domains.
        others: episodes of the other domains.
        folder: where measurements are kept.
        data: arguments of the data module, for the record.
    """

    learner: ModularMetaLearner
    store: ImageStore
    tested: Sequence[Place]
    others: Sequence[Place]
    folder: Path
    data: Mapping[str, object]

    @property
    def shots(self) -> list[int]:
        """The numbers of shots."""
        return list(dict.fromkeys(place.shots for place in self.tested))

    def measure(
        self, part: str, systems: Mapping[str, System], pairs: Sequence[tuple[str, str]], flipped: float = 0.0
    ) -> list[Result]:
        """Run what was not run before, and return all figures; systems of flipped labels are called so."""
        comparison = Comparison(
            checkpoints="", systems={name: {} for name in systems}, episodes=1 + max(p.draw for p in self.tested),
            shots=self.shots, flipped_labels=flipped, reference=NONE, differences=list(pairs), data=dict(self.data),
        )  # fmt: skip
        rows = self.rows(bool(flipped))
        missing = [p for p in self.tested if any((name, *cell(p)) not in rows.rows for name in systems)]
        begin = time.perf_counter()
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            run_comparison(comparison, systems, some, self.store, lambda domain: self.learner, rows)
            done = start + len(some)
            print(f"{part}: {done} of {len(missing)} episodes, {time.perf_counter() - begin:.0f} s", flush=True)
        whole = complete_rows(list(rows.rows.values()), comparison)
        found = compute_results(whole, comparison)
        # The source classifier looks at no label: what a user has who does not trust them.
        of_source = compute_results(whole, replace(comparison, reference="source")) if "source" in systems else []
        found += [replace(r, metric="harm_rate/source") for r in of_source if r.metric == "harm_rate"]
        return [replace(r, system=f"{r.system}, flipped labels") for r in found] if flipped else found

    def rows(self, flipped: bool) -> RowFile:
        """Return what was measured."""
        return RowFile(self.folder / ("rows_flipped.jsonl" if flipped else "rows.jsonl"))

    def changes(self, systems: Iterable[str]) -> list[Result]:
        """Return what flipped labels change in the accuracy of each system on the same episodes."""
        before, after = self.rows(False).rows, self.rows(True).rows
        results = []
        for shots in self.shots:
            places = [place for place in self.tested if place.shots == shots]
            for system in systems:
                figures = []
                for domain in domains_of(places):
                    keys = [(system, *cell(place)) for place in places if place.domain == domain]
                    change = np.array([after[key].accuracy - before[key].accuracy for key in keys])
                    figures.append(episode_weights(len(keys), rng(0, "bootstrap", domain, shots)) @ change)
                found = interval(np.mean(figures, axis=0))
                ways = len(places[0].classes)
                results.append(Result(system, MEAN, shots, ways, "flipping/accuracy", *found, len(places)))
        return results


def domains_of(places: Iterable[Place]) -> list[str]:
    return list(dict.fromkeys(place.domain for place in places))


def cell(place: Place) -> Cell:
    return place.domain, place.shots, place.draw


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="a fitted ModularMetaLearner")
    parser.add_argument("--out", default=Path("runs/benchmark-policy"), type=Path)
    parser.add_argument("--episodes", type=int, default=100, help="per test domain and number of shots, 2 or more")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    options, words = parser.parse_known_args()
    quiet()
    try:
        run(options, words)
    except ModmetaError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace, words: list[str]) -> None:
    data = dict(CommandLine(Arguments.parse(words)).datamodule.hparams)
    learner = load_learner(options.checkpoint)
    if not isinstance(learner, ModularMetaLearner) or not learner.trained:
        raise ModmetaError(f"checkpoint {options.checkpoint} is of no fitted ModularMetaLearner; give one")
    evidence = freeze(learner, data, options)
    results = gather(evidence, options.parts)
    write_results(options.out / "results.json", results)
    gates_plot(results, learner.model.units, options.out / "gates.png")
    print(write_table(results, options.out / "table.md"))


def freeze(learner: ModularMetaLearner, data: Mapping[str, object], options: argparse.Namespace) -> Evidence:
    """Draw the episodes, and refuse a folder that holds measurements of others.

    Raises:
        ModmetaError: for too few episodes, no test domain or no other one, and a folder of other settings.
    """
    tested = data["test_domains"]
    if options.episodes < 2 or not isinstance(tested, list) or not tested:
        raise ModmetaError("name the held-out domains as data.test_domains, and ask for 2 episodes or more")
    own = {**data, "train_domains": None, "val_domains": None, "eval_shots": options.shots}
    whole = DomainDataModule(**own)
    whole.setup("test")
    others = [domain for domain in whole.store.domains if domain not in tested]
    if not others:
        raise ModmetaError("the data has no domain beside those of the test, so there are no others to compare with")
    # Every episode of a test domain takes the indicators of one of another domain, each of which serves once.
    counts = dict.fromkeys(tested, options.episodes) | dict.fromkeys(others, -(-options.episodes // len(others)))
    modules = {}
    for domain, count in counts.items():
        modules[domain] = DomainDataModule(**{**own, "test_domains": [domain], "test_episodes": count})
        modules[domain].store = whole.store
        modules[domain].setup("test")
    manifest = draw_manifest(modules)
    options.out.mkdir(parents=True, exist_ok=True)
    episodes, checkpoint = options.out / "episodes.json", options.out / "checkpoint.sha256"
    digest = hashlib.sha256(Path(options.checkpoint).read_bytes()).hexdigest()
    if episodes.exists() and (read_manifest(episodes), checkpoint.read_text()) != (manifest, digest):
        raise ModmetaError(f"{options.out} holds measurements of another checkpoint or other episodes; choose another")
    write_atomically(checkpoint, digest.encode())
    manifest.write(episodes)
    mine = [place for place in manifest.places if place.domain in tested]
    rest = [place for place in manifest.places if place.domain not in tested]
    return Evidence(learner, whole.store, mine, rest, options.out, data)


def gather(evidence: Evidence, parts: Sequence[str]) -> list[Result]:
    """Measure the parts and return all figures; the other parts rest on the decisions, which are always taken."""
    learner, shots = evidence.learner, evidence.shots
    places = [*evidence.tested, *evidence.others]
    path = evidence.folder / "decisions.jsonl"
    decisions = decide_all(learner, places, evidence.store, path, lambda line: print(line, flush=True))
    domains, others = domains_of(places), domains_of(evidence.others)
    ways, learns = len(places[0].classes), [unit.learns for unit in learner.model.units]
    draws = 1 + max(place.draw for place in evidence.others)
    results = variation(decisions, domains, shots, draws, learns, ways) + use_of_units(decisions, domains, shots, ways)
    learned: dict[str, System] = {
        NONE: HeadSystem(), "policy": LearnerSystem(), "policy" + NO_VETO: LearnerSystem({"veto": False}),
    }  # fmt: skip
    if "shuffled" in parts:
        systems = learned | tampered(learner, decisions, domains_of(evidence.tested), others)
        pairs = [(name, "policy" + NO_VETO * name.endswith(NO_VETO)) for name in systems if name not in learned]
        results += evidence.measure("shuffled", systems, pairs)
    if "flipped" in parts:
        both = [("policy", "policy" + NO_VETO)]
        heads = {"source": Source(), "prototype": HeadSystem("prototype"), "ridge": HeadSystem("ridge")}
        results += evidence.measure("flipped, clean labels", learned | heads, both)
        results += evidence.measure("flipped", learned | heads, both, FLIPPED)
        results += evidence.changes(learned | heads)
    if "indicators" in parts:
        blind = switched_off(learner, decisions)
        systems = {NONE: learned[NONE], "policy": learned["policy"]} | blind
        results += evidence.measure("indicators", systems, [(name, "policy") for name in blind])
    # What several parts measured is the same in all.
    return list({(r.system, r.domain, r.shots, r.metric): r for r in results}.values())


if __name__ == "__main__":
    main()
