"""Classes that belong to one domain each, although folders of several domains share a name."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from modmeta.data.images import Ids, ImageStore


class OwnClasses(ImageStore):
    """The images of another store, where a class of one domain is no class of another.

    Domains share classes by name: a dog is a dog in every drawing style. The first character of two alphabets is not
    the same character, though both folders may be called ``character01``.

    Args:
        store: the images; row ``r`` stays row ``r``, and a class is called ``domain/class``.
    """

    def __init__(self, store: ImageStore) -> None:
        pairs = [(domain, name) for domain in store.domains for name in store.classes_of(domain)]
        index = {pair: number for number, pair in enumerate(pairs)}
        names = [
            (store.domains[domain], store.classes[own])
            for domain, own in zip(store.row_domains.tolist(), store.row_classes.tolist(), strict=True)
        ]
        super().__init__(
            store.domains,
            ["/".join(pair) for pair in pairs],
            store.row_domains,
            np.array([index[pair] for pair in names]),
            store.image_size,
            store.key,
            store.content,
        )
        self.store = store
        self.quarantined = store.quarantined

    def load(self, ids: Ids) -> Tensor:
        """Return the images of some rows, ``(n, 3, image_size, image_size)``, uint8."""
        return self.store.load(ids)
