"""Quarter turns of a class as classes of their own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modmeta.data.images import Ids, ImageStore

TURNS = 4


class RotatedClasses(ImageStore):
    """The images of another store in four orientations, each orientation of a class being a class.

    Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", ICML 2016, made more characters of
    Omniglot that way, and the field has done so since.

    Args:
        store: the images as they are; row ``r`` of it under turn ``t`` is row ``t * len(store) + r`` here, and a
            turned class is called ``class@90``, ``class@180``, ``class@270``.
    """

    def __init__(self, store: ImageStore) -> None:
        count = len(store.classes)
        super().__init__(
            store.domains,
            [f"{name}@{90 * turn}" if turn else name for turn in range(TURNS) for name in store.classes],
            np.tile(store.row_domains, TURNS),
            np.concatenate([store.row_classes + turn * count for turn in range(TURNS)]),
            store.image_size,
            f"{store.key}-rotated",
            f"{store.content}-rotated",
        )
        self.store = store
        self.quarantined = store.quarantined

    def load(self, ids: Ids) -> Tensor:
        """Return the images of some rows, ``(n, 3, image_size, image_size)``, uint8."""
        turned = torch.as_tensor(ids)
        turns, rows = turned // len(self.store), turned % len(self.store)
        images = self.store.load(rows)
        for turn in range(1, TURNS):
            chosen = turns == turn
            images[chosen] = images[chosen].rot90(turn, (-2, -1))
        return images
