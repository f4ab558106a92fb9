"""What a run says about the images that it used and refused."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from modmeta.data import DomainDataModule, ImageStore
from modmeta.files import write_atomically


class ImageRecord(Callback):
    """Writes ``images.json`` into the run folder: how many images there are, and every refused file with its reason."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; the data module has opened its images by now."""
        folder = trainer.log_dir  # asked for on every rank: it is broadcast
        data = getattr(trainer, "datamodule", None)
        trial = getattr(trainer, "fast_dev_run", False)
        if folder is None or trial or not trainer.is_global_zero or not isinstance(data, DomainDataModule):
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_image_record(data.store, Path(folder))


def write_image_record(store: ImageStore, folder: Path) -> None:
    """Write ``images.json`` of a store into a folder."""
    record = {
        "key": store.key,
        "images": len(store),
        "quarantined": [{"image": found.relative, "reason": found.reason} for found in store.quarantined],
    }
    write_atomically(folder / "images.json", (json.dumps(record, indent=2) + "\n").encode())
