"""The contract of an image store: what episodes are drawn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from modmeta.data.inspect import Inspection
from modmeta.errors import unknown

Ids = Sequence[int] | np.ndarray | Tensor


class ImageStore(ABC):
    """Labelled images of several domains, numbered by row.

    Different rows of a class are different images: an episode that takes a row for its support and another for
    its query relies on that. ``quarantined`` lists the files that a store on disk has refused.

    Args:
        domains: the names of the domains.
        classes: the names of the classes; a domain may lack some.
        row_domains: ``(N,)``, for each row an index into ``domains``.
        row_classes: ``(N,)``, for each row an index into ``classes``.
        image_size: side of the square images, in pixels.
        key: changes whenever any row's pixels may have changed; names caches.
        content: changes only when a row's name or pixels have changed, wherever and whenever they were written;
            default: ``key``.
    """

    quarantined: tuple[Inspection, ...] = ()

    def __init__(
        self,
        domains: Sequence[str],
        classes: Sequence[str],
        row_domains: np.ndarray,
        row_classes: np.ndarray,
        image_size: int,
        key: str,
        content: str | None = None,
    ) -> None:
        self.domains = tuple(domains)
        self.classes = tuple(classes)
        self.row_domains = np.asarray(row_domains, dtype=np.int64)
        self.row_classes = np.asarray(row_classes, dtype=np.int64)
        self.image_size = image_size
        self.key = key
        self.content = key if content is None else content
        cell = self.row_domains * len(self.classes) + self.row_classes
        order = np.argsort(cell, kind="stable")
        bounds = np.searchsorted(cell[order], np.arange(len(self.domains) * len(self.classes) + 1))
        self._cells = [order[low:high] for low, high in pairwise(bounds)]

    def __len__(self) -> int:
        return len(self.row_classes)

    def ids(self, domain: str, class_name: str) -> np.ndarray:
        """Return the rows ``(n,)``, int64, of a class in a domain; none if the domain lacks the class.

        Raises:
            ModmetaError: if the domain or the class is unknown.
        """
        if domain not in self.domains:
            raise unknown("domain", domain, self.domains)
        if class_name not in self.classes:
            raise unknown("class", class_name, self.classes)
        return self._cells[self.domains.index(domain) * len(self.classes) + self.classes.index(class_name)]

    def classes_of(self, domain: str) -> tuple[str, ...]:
        """Return the classes that a domain has images of."""
        return tuple(name for name in self.classes if len(self.ids(domain, name)))

    @abstractmethod
    def load(self, ids: Ids) -> Tensor:
        """Return the images of some rows, ``(n, 3, image_size, image_size)``, uint8."""
