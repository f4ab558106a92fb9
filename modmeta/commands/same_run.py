"""Whether a fit that goes on from a checkpoint is the fit that wrote it: its configuration and its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modmeta import __version__
from modmeta.data import ImageStore
from modmeta.errors import ModmetaError

_RECORD = "modmeta_run"
_LONGEST_VALUE = 60
_MOST = 8  # changes that a message names

_FREE = frozenset({
    "name", "modules", "ckpt_path", "test_after_fit",
    "data.num_workers", "data.strict_images", "model.init_args.cache_dir",
    *(f"trainer.{key}" for key in (
        "max_epochs", "max_steps", "min_epochs", "min_steps", "max_time", "logger", "callbacks", "plugins", "profiler",
        "default_root_dir", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing",
        "enable_autolog_hparams", "model_registry", "detect_anomaly",
    )),
})  # fmt: skip
"""How long a fit goes on, and what it shows and writes: nothing that its results depend on."""
_PLACES = frozenset({"data.root", "data.cache_dir", "model.init_args.backbone.pretrained"})
"""Where data and weights lie; what lies there is compared by its content."""
_DEVICES = frozenset({"trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"})
"""Results depend on these by rounding alone, which is told."""


class RunRecord(Callback):
    """Writes into every checkpoint what a resumed run is compared with, and compares the data of one.

    Args:
        config: the resolved configuration, as YAML.
        found: the checkpoint that the fit goes on from, if there is one.
    """

    def __init__(self, config: str, found: Mapping[str, Any] | None = None) -> None:
        self._config = config
        self._data = None if found is None else found.get(_RECORD, {}).get("data")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other data than those of the checkpoint, once the data module has read them.

        Raises:
            ModmetaError: naming what changed.
        """
        if stage == "fit" and self._data is not None:
            refuse_other_data(self._data, describe_data(_store(trainer)))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add configuration and data."""
        checkpoint[_RECORD] = {
            "version": __version__, "config": self._config, "data": describe_data(_store(trainer)),
        }  # fmt: skip


def refuse_other_config(found: Mapping[str, Any], config: str) -> None:
    """Refuse to go on from a checkpoint under another configuration, before any data are read.

    Args:
        found: the checkpoint.
        config: the resolved configuration of now, as YAML.

    Raises:
        ModmetaError: with what each changed key was, and what it is.
    """
    if _RECORD not in found:
        _say("the checkpoint does not say how it was made: neither configuration nor data are compared")
        return
    record = found[_RECORD]
    was, now = dict(_leaves(yaml.safe_load(record["config"]))), dict(_leaves(yaml.safe_load(config)))
    if record["version"] != __version__:  # which may have had fewer keys
        now = {key: value for key, value in now.items() if key in was}
    changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key, _ABSENT) != now.get(key, _ABSENT)]
    changes = {key: f"{key}: was {_show(was, key)}, is {_show(now, key)}" for key in changed}
    for key in _DEVICES & changes.keys():
        _say(f"{changes[key]}; results do not depend on it, but for rounding")
    refused = [change for key, change in changes.items() if not _is_free(key)]
    if refused:
        more = f"; and {len(refused) - _MOST} more" if len(refused) > _MOST else ""
        raise ModmetaError(
            f"the checkpoint is of a run with another configuration: {'; '.join(refused[:_MOST])}{more}; change it "
            f"back, or begin a new run without a checkpoint"
        )


def describe_data(store: ImageStore) -> dict[str, Any]:
    """Return the identity of the images of a store, and how many there are of each domain, as plain data."""
    counts = {name: int((store.row_domains == index).sum()) for index, name in enumerate(store.domains)}
    return {"content": store.content, "images": counts}


def refuse_other_data(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse data that are not those of a checkpoint; both are as :func:`describe_data` says.

    Raises:
        ModmetaError: naming the domains that have another number of images.
    """
    if was["content"] == now["content"]:
        return
    before, after = was["images"], now["images"]
    changes = [
        f"domain {name!r}: was {before.get(name, 0)} images, is {after.get(name, 0)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, 0) != after.get(name, 0)
    ]
    more = f"; and {len(changes) - _MOST} more domains" if len(changes) > _MOST else ""
    what = "; ".join(changes[:_MOST]) + more if changes else "as many in each domain, but not the same names or content"
    raise ModmetaError(
        f"the data are not those of the checkpoint: {what}; bring them back, or begin a new run without a checkpoint"
    )


_ABSENT = object()


def _store(trainer: Trainer) -> ImageStore:
    store: ImageStore = trainer.datamodule.store  # type: ignore[attr-defined]
    return store


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield full keys and values; records in a list are numbered."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        for number, each in enumerate(value):
            yield from _leaves(each, f"{name}[{number}]")
    else:
        yield name, value


def _is_free(key: str) -> bool:
    """Whether a key, or a group that it belongs to, may change."""
    parts = key.replace("[", ".[").split(".")
    groups = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return bool(groups & (_FREE | _PLACES | _DEVICES))


def _show(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = "null" if values[key] is None else str(values[key])
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


@rank_zero_only
def _say(message: str) -> None:
    print(f"note: {message}")
