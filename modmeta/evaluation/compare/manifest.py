"""The episodes of a comparison, frozen: which images of which classes, on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from modmeta.data import DomainDataModule, Episode, ImageStore
from modmeta.errors import ModmetaError
from modmeta.files import write_atomically

FORMAT = 1
_CHUNK = 256  # images in memory at once


@dataclass(frozen=True)
class Place:
    """One frozen episode.

    Attributes:
        domain: its domain.
        shots: support images per class.
        draw: its number among the episodes of that domain and number of shots.
        classes: label ``i`` means ``classes[i]``.
        support: rows of the image store, sorted by label, ``shots`` for each class.
        query: rows of the image store, sorted by label, equally many for each class.
    """

    domain: str
    shots: int
    draw: int
    classes: tuple[str, ...]
    support: tuple[int, ...]
    query: tuple[int, ...]

    def episode(self, store: ImageStore) -> Episode:
        """Return the images and labels of this episode, numbered by its draw."""
        ids = torch.tensor([*self.query, *self.support])
        images = store.load(ids)
        count, labels = len(self.query), torch.arange(len(self.classes))
        return Episode(
            index=self.draw,
            domain=self.domain,
            classes=self.classes,
            shots=self.shots,
            support=images[count:],
            support_labels=labels.repeat_interleave(self.shots),
            support_ids=ids[count:],
            query=images[:count],
            query_labels=labels.repeat_interleave(count // len(self.classes)),
            query_ids=ids[:count],
        )


@dataclass(frozen=True)
class Manifest:
    """All episodes of a comparison and the images that they are of.

    Attributes:
        key: content key of the image store that they were drawn from.
        pixels: SHA-256 of the decoded images, which stays the same where a copy of the data has another key.
        image_size: side of the images in pixels.
        places: the episodes.
    """

    key: str
    pixels: str
    image_size: int
    places: tuple[Place, ...]

    def select(self, domains: Iterable[str], shots: Iterable[int], episodes: int) -> list[Place]:
        """Return the first so many episodes of each domain and number of shots, domain by domain, draw by draw.

        Raises:
            ModmetaError: if there are fewer.
        """
        by_cell = {(p.domain, p.shots, p.draw): p for p in self.places}
        wanted = [(domain, k, draw) for domain in domains for draw in range(episodes) for k in shots]
        for domain, k, draw in wanted:
            if (domain, k, draw) not in by_cell:
                raise ModmetaError(
                    f"the manifest has no episode {draw} of domain {domain!r} with {k} shots; ask for fewer, or "
                    f"leave --manifest out to draw them"
                )
        return [by_cell[cell] for cell in wanted]

    def check(self, store: ImageStore) -> None:
        """Make sure that the rows of a store are the images that the episodes were drawn from.

        Raises:
            ModmetaError: if they are not.
        """
        if self.image_size != store.image_size:
            raise ModmetaError(
                f"the manifest is for images of {self.image_size} pixels, and data.image_size is {store.image_size}"
            )
        if self.key == store.key:
            return
        highest = max(max(*p.support, *p.query) for p in self.places)
        if highest >= len(store) or self.pixels != digest_pixels(store, self.places):
            raise ModmetaError(
                "the images are not those that the manifest's episodes were drawn from; bring the data folder back, "
                "or choose another output folder to draw new episodes"
            )

    def write(self, path: str | Path) -> None:
        """Write the manifest, whole or not at all."""
        head = {"format": FORMAT, "key": self.key, "pixels": self.pixels, "image_size": self.image_size}
        # One line per episode: a file that people can read and compare.
        lines = ",\n".join(json.dumps(asdict(place)) for place in self.places)
        write_atomically(path, f'{json.dumps(head)[:-1]}, "episodes": [\n{lines}\n]}}\n'.encode())


def draw_manifest(modules: Mapping[str, DomainDataModule]) -> Manifest:
    """Freeze the test episodes of data modules.

    Args:
        modules: for each domain a data module, set up, whose only test domain it is; they share one image store.
    """
    store = next(iter(modules.values())).store
    places = []
    for domain, module in modules.items():
        cells = module.hparams["test_episodes"] * len(module.hparams["eval_shots"])
        for index in range(cells):
            e = module.episode("test", index)
            rows = tuple(e.support_ids.tolist()), tuple(e.query_ids.tolist())
            places.append(Place(domain, e.shots, index // len(module.hparams["eval_shots"]), e.classes, *rows))
    return Manifest(store.key, digest_pixels(store, places), store.image_size, tuple(places))


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest.

    Raises:
        ModmetaError: if it is missing, broken, or an episode has an image in both support and query.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModmetaError(f"the manifest {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise ModmetaError(f"the manifest {path} cannot be read ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModmetaError(f"{path} is no manifest of episodes of format {FORMAT}")
    try:
        places = tuple(_place(each) for each in content["episodes"])
        return Manifest(content["key"], content["pixels"], content["image_size"], places)
    except (KeyError, TypeError, ValueError) as error:
        raise ModmetaError(f"the manifest {path} is damaged ({error}); delete it or bring it back") from error


def digest_pixels(store: ImageStore, places: Iterable[Place]) -> str:
    """Return the SHA-256 of the images that episodes consist of, in the order of their rows."""
    rows = torch.tensor(sorted({row for place in places for row in (*place.support, *place.query)}))
    digest = hashlib.sha256()
    for some in rows.split(_CHUNK):
        digest.update(some.numpy().tobytes())
        digest.update(store.load(some).contiguous().numpy().data)
    return digest.hexdigest()


def _place(record: Mapping[str, Any]) -> Place:
    lists = {name: tuple(record[name]) for name in ("classes", "support", "query")}
    place = Place(domain=record["domain"], shots=record["shots"], draw=record["draw"], **lists)
    where = f"episode {place.draw} of domain {place.domain!r} with {place.shots} shots"
    if set(place.support) & set(place.query):
        raise ValueError(f"{where} has an image in both support and query")
    if len(place.support) != place.shots * len(place.classes) or len(place.query) % len(place.classes):
        raise ValueError(f"{where} has the wrong number of images")
    if not place.query or not all(isinstance(row, int) and row >= 0 for row in (*place.support, *place.query)):
        raise ValueError(f"{where} has rows that are none")
    return place
