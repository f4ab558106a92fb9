"""Every kind of file that modmeta writes, as a row of generations: one writes, one reads and says which is there.

``crashes.py`` stops the writing and then asks the reading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors.torch import load, save
from torch import Tensor

from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.adapters.adapter_file import AdapterFile, read_adapter, write_adapter
from modmeta.backbone import Backbone
from modmeta.commands.run_folder import MetricsLogger, SavedConfig
from modmeta.data import RowCache
from modmeta.errors import ModmetaError
from modmeta.evaluation.compare import Manifest, Row, RowFile
from modmeta.evaluation.compare.manifest import Place, read_manifest
from modmeta.evaluation.results import write_results
from modmeta.files import drop_torn_line, write_atomically
from modmeta.learners import AtomicCheckpointIO, Result
from modmeta.learners.action_table import read_header, write_part
from modmeta.learners.checkpoint_io import load_plain


@dataclass(frozen=True)
class Writer:
    """One kind of file.

    Attributes:
        name: what it is.
        write: puts generation ``n`` into a folder that holds generation ``n - 1``; the first is 0.
        read: returns the generation that a folder holds, after looking at all of it.
        protected: whether modmeta's own code writes it; others show what the harness finds.
    """

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], int]
    protected: bool = True


_ROWS = 15  # more than a page of memory, in which a full tmpfs still has space


def _state(generation: int, numbers: int) -> dict[str, Any]:
    weight = torch.arange(numbers, dtype=torch.float32) + generation
    return {"state_dict": {"weight": weight}, "optimizer_states": [], "epoch": generation}


def _generation_of(checkpoint: dict[str, Any]) -> int:
    weight: Tensor = checkpoint["state_dict"]["weight"]
    expected = _state(checkpoint["epoch"], len(weight))["state_dict"]["weight"]
    assert torch.equal(weight, expected), "the weights are of no generation"
    return int(checkpoint["epoch"])


def _checkpoint(name: str, numbers: int) -> Writer:
    def write(folder: Path, generation: int) -> None:
        AtomicCheckpointIO().save_checkpoint(_state(generation, numbers), folder / "last.ckpt")

    return Writer(name, write, lambda folder: _generation_of(load_plain(folder / "last.ckpt")))


def _rotate(folder: Path, generation: int) -> None:
    # What ModelCheckpoint does with one file per epoch.
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint(_state(generation, 20_000), folder / f"epoch={generation}.ckpt")
    plugin.remove_checkpoint(folder / f"epoch={generation - 1}.ckpt")


def _newest(folder: Path) -> int:
    return max(_generation_of(load_plain(file)) for file in folder.glob("*.ckpt"))  # all of them are whole


@cache
def _adapted() -> tuple[AdaptedBackbone, AdapterFile, str]:
    torch.manual_seed(0)
    model = AdaptedBackbone(Backbone("test_efficientnet", False, 32), [UnitConfig("film", group="all")])
    width = model.backbone.feature_dim
    head = {"weight": torch.ones(width, 3), "bias": torch.zeros(3), "center": torch.ones(width)}
    plan = {"units": [unit.name for unit in model.units], "gates": [0.5], "rates": [[0.1]]}
    content = AdapterFile(("a", "b", "c"), plan, model.fresh(), head | {"scale": torch.ones(())}, {}, {})
    return model, content, model.backbone.fingerprint()


def _write_adapter(folder: Path, generation: int) -> None:
    model, content, _ = _adapted()
    numbered = replace(content, provenance={"generation": generation})
    write_adapter(folder / "a.safetensors", model, numbered)


def _read_adapter(folder: Path) -> int:
    model, _, fingerprint = _adapted()
    return int(read_adapter(folder / "a.safetensors", model, fingerprint).provenance["generation"])


def _write_backbone(folder: Path, generation: int) -> None:
    write_atomically(folder / "backbone.safetensors", save({"weight": torch.full((30_000,), float(generation))}))


def _read_backbone(folder: Path) -> int:
    weight = load((folder / "backbone.safetensors").read_bytes())["weight"]
    assert bool((weight == weight[0]).all())
    return int(weight[0])


def _write_results(folder: Path, generation: int) -> None:
    one = Result("adapted", "neon", 5, 5, "accuracy", float(generation), 0.0, 1.0, 10)
    write_results(folder / "results.json", [one] * 40)


def _read_results(folder: Path) -> int:
    values = {record["value"] for record in json.loads((folder / "results.json").read_text())}
    assert len(values) == 1
    return int(values.pop())


def _write_manifest(folder: Path, generation: int) -> None:
    places = tuple(Place("neon", 1, draw, ("a", "b"), (0, 1), (2, 3)) for draw in range(100))
    Manifest(str(generation), "pixels", 32, places).write(folder / "episodes.json")


def _write_row(folder: Path, generation: int) -> None:
    file, bins = RowFile(folder / "rows.jsonl"), [[0.0, 0.0, 0.0]] * 15
    for draw in range(len(file.rows), _ROWS * (generation + 1)):
        file.append(Row("a", "neon", 1, draw, 3, 0.5, 0.5, 0.0, 0, 0.1, bins))


def _read_rows(folder: Path) -> int:
    draws = [row.draw for row in RowFile(folder / "rows.jsonl").rows.values()]
    assert draws == list(range(len(draws))), draws
    return len(draws) // _ROWS - 1


def _write_metrics(folder: Path, generation: int) -> None:
    # A new process each time, as after a resume, and every third time a new column, for which all is written anew.
    logger = MetricsLogger(folder.parent, folder.name, cast(Any, ""), resumed_at=generation)
    logger.log_metrics({f"metric{n}": float(generation) for n in range(1 + generation // 3)}, generation)
    logger.save()


def _read_metrics(folder: Path) -> int:
    lines = drop_torn_line(folder / "metrics.csv")
    steps = [int(line.split(b",")[-1]) for line in lines[1:]]
    assert steps == list(range(len(steps))), steps
    return len(steps) - 1


def _write_config(folder: Path, generation: int) -> None:
    text = yaml.safe_dump({"generation": generation, "data": {f"key{n}": generation for n in range(200)}})
    parser = SimpleNamespace(dump=lambda config, skip_none: text)
    trainer = SimpleNamespace(log_dir=str(folder), is_global_zero=True)
    SavedConfig(cast(Any, parser), cast(Any, None)).setup(cast(Any, trainer), cast(Any, None), "fit")


def _read_config(folder: Path) -> int:
    found = yaml.safe_load((folder / "config.yaml").read_text())
    assert set(found["data"].values()) == {found["generation"]}
    return int(found["generation"])


def _write_part(folder: Path, generation: int) -> None:
    rows = [{"episode": n, "action": "idle", "nll": float(generation)} for n in range(500)]
    write_part(folder / "part-00000.parquet", rows, {"generation": generation})


def _read_part(folder: Path) -> int:
    header, rows = read_header(folder / "part-00000.parquet")
    assert rows == 500
    return int(header["generation"])


def _cache(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Writer:
    """Return the writer of more and more rows of one table."""
    width, rows = 4, 40

    def values(ids: Tensor) -> Tensor:
        return ids.reshape(-1, *(1 for _ in shape)).expand(-1, *shape)

    def write(folder: Path, generation: int) -> None:
        wanted = range(width * generation, width * generation + width)
        RowCache(folder / "cache", rows, shape, dtype).get(wanted, values)

    def read(folder: Path) -> int:
        wanted: list[int] = []

        def missing(ids: Tensor) -> Tensor:
            wanted.extend(ids.tolist())
            return values(ids)

        # Rows that are there are taken as they are; what is missing is noted.
        found = RowCache(folder / "cache", rows, shape, dtype).get(range(rows), missing)
        assert torch.equal(found, values(torch.arange(rows)).to(dtype)), "a row is wrong"
        sums = np.load(folder / "cache" / "sums.npy", mmap_mode="r+")
        sums[wanted] = 0  # reading leaves it as it was
        return (min(wanted) if wanted else rows) // width - 1

    return Writer(name, write, read)


def _new_caches(folder: Path, generation: int) -> None:
    RowCache(folder / f"cache{generation}", 40, (3000,)).get([0], lambda ids: torch.full((len(ids), 3000), 7.0))


def _read_caches(folder: Path) -> int:
    generations = sorted(int(path.name.removeprefix("cache")) for path in folder.glob("cache*"))
    for generation in generations:
        _new_caches(folder, generation)  # it can be opened
        found = RowCache(folder / f"cache{generation}", 40, (3000,)).get([0], lambda ids: torch.zeros(1, 3000))
        assert bool((found == 7.0).all())
    return generations[-1]


def _write_with_lightning(folder: Path, generation: int) -> None:
    # Each is larger than the one before, as a file in place of another finds its space on a full disk.
    with _refusing():
        TorchCheckpointIO().save_checkpoint(_state(generation, 200_000 * (1 + generation)), folder / "last.ckpt")


def _read_with_torch(folder: Path) -> int:
    return _generation_of(torch.load(folder / "last.ckpt", weights_only=True))


def _write_plainly(folder: Path, generation: int) -> None:
    with _refusing():
        (folder / "results.json").write_text(json.dumps([{"value": generation}] * 10_000 * (1 + generation)))


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModmetaError(str(error)) from error


def writers() -> list[Writer]:
    """Return every writer of modmeta."""
    return [
        _checkpoint("checkpoint, 80 kB", 20_000),
        _checkpoint("checkpoint, 2 MB", 500_000),
        Writer("checkpoints in turn", _rotate, _newest),
        Writer("adapter file", _write_adapter, _read_adapter),
        Writer("source backbone", _write_backbone, _read_backbone),
        Writer("results", _write_results, _read_results),
        Writer("manifest", _write_manifest, lambda folder: int(read_manifest(folder / "episodes.json").key)),
        Writer("rows of a comparison", _write_row, _read_rows),
        Writer("metrics", _write_metrics, _read_metrics),
        Writer("configuration", _write_config, _read_config),
        Writer("action table", _write_part, _read_part),
        _cache("feature cache", torch.float32, (3000,)),
        _cache("image cache", torch.uint8, (3, 32, 32)),
        Writer("new caches", _new_caches, _read_caches),
    ]


def unprotected() -> list[Writer]:
    """Return writers that lose files, for comparison."""
    return [
        Writer("Lightning's own plugin", _write_with_lightning, _read_with_torch, protected=False),
        Writer("Path.write_text", _write_plainly, _read_results, protected=False),
    ]
