"""Which domains, classes and images training, validation and test draw from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from modmeta.data.images import ImageStore
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError, unknown

Pool = Mapping[str, Mapping[str, np.ndarray]]  # domain -> class -> rows of the image store
MIXED = "mixed"


@dataclass(frozen=True)
class Side:
    """The domains and classes of training, validation or test; ``name`` says which."""

    name: str
    domains: tuple[str, ...]
    classes: tuple[str, ...]

    def pool(self, store: ImageStore) -> Pool:
        """Return the rows of every class that each domain has, in the store's order."""
        pool: dict[str, dict[str, np.ndarray]] = {}
        for domain in self.domains:
            classes = [name for name in store.classes_of(domain) if name in self.classes]
            pool[domain] = {name: store.ids(domain, name) for name in classes}
        return pool


def split_store(
    store: ImageStore,
    domains: Mapping[str, Sequence[str] | None],
    classes: Mapping[str, Sequence[str] | None],
    seen_in_test: bool = False,
) -> dict[str, Side]:
    """Resolve what a user wrote about domains and classes.

    Args:
        store: the images.
        domains: for ``train``, ``val`` and ``test`` the domains asked for; None or nothing for
            ``train`` means those that the others do not name.
        classes: for ``val`` and ``test`` the classes that never occur in training, if any.
        seen_in_test: whether a test on new classes holds the training classes, too.

    Returns:
        The three sides. Validation without domains is on the training domains; so is a test on new
        classes. A test without domains or classes of its own has no domains.

    Raises:
        ModmetaError: for unknown or overlapping names, and when nothing is left for training.
    """
    chosen = {side: _known("domain", f"{side}_domains", domains[side], store.domains) for side in domains}
    held_out = {side: _known("class", f"{side}_classes", classes[side], store.classes) for side in classes}
    _refuse_overlap("domain", chosen)
    _refuse_overlap("class", held_out)
    train = chosen["train"] or tuple(n for n in store.domains if n not in chosen["val"] + chosen["test"])
    old = tuple(name for name in store.classes if name not in held_out["val"] + held_out["test"])
    if not train:
        raise ModmetaError("val_domains and test_domains leave no domain for training; leave some out")
    if not old:
        raise ModmetaError("val_classes and test_classes leave no class for training; leave some out")
    test = chosen["test"] or (train if held_out["test"] else ())
    if seen_in_test and not (chosen["test"] and held_out["test"]):
        # In the training domains, images of the training classes were trained on.
        raise ModmetaError("test_seen_classes asks for test_classes, and for test_domains of their own; name both")
    test_classes = tuple(name for name in store.classes if name in held_out["test"] or (seen_in_test and name in old))
    return {
        "train": Side("train", train, old),
        "val": Side("val", chosen["val"] or train, held_out["val"] or old),
        "test": Side("test", test, test_classes or old),
    }


def share_pool(pool: Pool, share: float, seed: int) -> tuple[Pool, Pool]:
    """Divide each class of each domain between source training and episodes.

    Returns:
        The source pool, in a seeded order, and the episode pool. With a share of 1 both hold everything.
    """
    source: dict[str, dict[str, np.ndarray]] = {}
    rest: dict[str, dict[str, np.ndarray]] = {}
    for domain, by_class in pool.items():
        source[domain], rest[domain] = {}, {}
        for name, rows in by_class.items():
            shuffled = rng(seed, "source share", domain, name).permutation(rows)
            count = max(1, round(share * len(rows)))
            source[domain][name] = shuffled[:count]
            rest[domain][name] = rows if share == 1 else np.sort(shuffled[count:])
    return source, rest


def mix_pool(pool: Pool) -> Pool:
    """Return the one domain ``mixed`` of everything in a pool; classes of one name become one class."""
    rows: dict[str, list[np.ndarray]] = {}
    for by_class in pool.values():
        for name, own in by_class.items():
            rows.setdefault(name, []).append(own)
    return {MIXED: {name: np.concatenate(parts) for name, parts in rows.items()}} if rows else {}


def check_pool(side: str, pool: Pool, ways: tuple[int, int] | None, shots: int, queries: int) -> None:
    """Make sure that every episode that may be drawn from a pool exists.

    Raises:
        ModmetaError: naming the first domain with too few classes or images.
    """
    for domain, by_class in pool.items():
        needed_ways = 2 if ways is None else ways[1]
        if len(by_class) < needed_ways:
            raise ModmetaError(
                f"domain {domain!r} has {len(by_class)} classes for {side} episodes, and ways asks for "
                f"{needed_ways}; lower ways or leave the domain out"
            )
        for name, rows in by_class.items():
            if len(rows) < shots + queries:
                raise ModmetaError(
                    f"domain {domain!r} has {len(rows)} images of class {name!r} for {side} episodes, and "
                    f"{shots} shots + {queries} queries ask for {shots + queries}; lower them or add images"
                )


def _known(noun: str, where: str, names: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    for name in names or ():
        if name not in known:
            raise unknown(noun, name, known, where)
    return tuple(dict.fromkeys(names or ()))


def _refuse_overlap(noun: str, chosen: Mapping[str, tuple[str, ...]]) -> None:
    for one, other in combinations(chosen, 2):
        for name in chosen[one]:
            if name in chosen[other]:
                plural = "domains" if noun == "domain" else "classes"
                raise ModmetaError(
                    f"{noun} {name!r} is in both {one}_{plural} and {other}_{plural}; remove it from one"
                )
