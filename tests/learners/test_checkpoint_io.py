"""Checkpoints: the old one stays until the new one is sound, and nothing damaged or executable gets through."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from modmeta import AtomicCheckpointIO, ModmetaError
from modmeta.learners.checkpoint_io import load_plain

STATE: dict[str, Any] = {
    "state_dict": {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.count": torch.tensor(3)},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0)}}}],
    "lr_schedulers": [{"best": float("inf")}],
    "callbacks": {"EarlyStopping": {"best_score": torch.tensor(float("inf"))}},
    "epoch": 1,
}


class Small(LightningModule):
    """Predicts with one layer, and has the loss that is asked for."""

    def __init__(self, loss_factor: float = 1.0) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.loss_factor = loss_factor

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean() * self.loss_factor
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: Small, folder: Path, checkpoint: str | None = None, epochs: int = 2, **options: Any) -> ModelCheckpoint:
    """Fit on eight points with the plugin, with one checkpoint per epoch."""
    kept = ModelCheckpoint(folder, **options)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[kept], plugins=[AtomicCheckpointIO()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.linspace(-1, 1, 16).reshape(8, 2)), batch_size=4)
    trainer.fit(model, data, ckpt_path=checkpoint)
    return kept


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    return path


def same(found: dict[str, Any]) -> bool:
    """Whether this is what was written."""
    return found["epoch"] == 1 and torch.equal(found["state_dict"]["layer.weight"], STATE["state_dict"]["layer.weight"])


def test_it_is_one_file_that_torch_reads_too(written: Path) -> None:
    assert same(AtomicCheckpointIO().load_checkpoint(written))
    assert same(torch.load(written, weights_only=True))
    assert same(torch.load(written, weights_only=True, mmap=True))
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"modmeta-sha256:")
    assert [path.name for path in written.parent.iterdir()] == ["last.ckpt"]


def test_checkpoints_of_other_writers_are_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "plain.ckpt")
    assert same(load_plain(tmp_path / "plain.ckpt"))


@pytest.mark.fault(26)
def test_every_changed_byte_is_found(written: Path) -> None:
    data = written.read_bytes()
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randperm(len(data), generator=generator)[:300].tolist()
    for place in {*anywhere, *range(4), *range(len(data) - 110, len(data))}:
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        written.write_bytes(changed)
        with pytest.raises(ModmetaError, match=r"is damaged: its checksum does not fit|cannot be read"):
            load_plain(written)


@pytest.mark.fault(19, 26)
def test_every_cut_and_every_addition_is_found(written: Path) -> None:
    data = written.read_bytes()
    for end in {0, 1, 22, len(data) // 2, len(data) - 101, len(data) - 79, len(data) - 1}:
        written.write_bytes(data[:end])
        with pytest.raises(ModmetaError, match=r"last\.ckpt (is damaged|cannot be read)"):
            load_plain(written)
    written.write_bytes(data + b"\0")
    with pytest.raises(ModmetaError, match=r"last\.ckpt cannot be read"):
        load_plain(written)


@pytest.mark.fault(27)
def test_code_is_never_run_whatever_lightning_asks_for(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    torch.save(STATE | {"hyper_parameters": Payload()}, tmp_path / "bad.ckpt")
    for weights_only in (None, False, True):
        with pytest.raises(ModmetaError, match=r"bad\.ckpt cannot be read"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt", weights_only=weights_only)
    assert not canary.exists()


@pytest.mark.fault(27)
def test_what_could_not_be_loaded_is_not_written(written: Path) -> None:
    for thing in (Path("a"), nn.Linear(1, 1)):
        with pytest.raises(ModmetaError, match=r"is not written: it holds .*save plain data"):
            AtomicCheckpointIO().save_checkpoint(STATE | {"hyper_parameters": {"thing": thing}}, written)
    assert same(load_plain(written))


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ({"state_dict": {"layer.weight": torch.tensor([1.0, float("nan")])}}, r"state_dict\['layer\.weight'\]"),
        ({"state_dict": {"layer.weight": torch.tensor(float("-inf"))}}, r"state_dict\['layer\.weight'\]"),
        ({"state_dict": {"x._extra_state": {"t": [torch.tensor(torch.inf)]}}}, r".*\['t'\]\[0\]"),
        ({"optimizer_states": [{"state": {0: {"m": torch.tensor(torch.nan)}}}]}, r"optimizer_states\[0\]"),
        ({"callbacks": {"Best": {"score": torch.tensor(torch.nan)}}}, r"callbacks\['Best'\]\['score'\]"),
        ({"loss": float("nan")}, "loss"),
    ],
)
def test_what_is_not_finite_is_not_written(written: Path, damage: dict[str, Any], name: str) -> None:
    with pytest.raises(ModmetaError, match=rf"is not written: {name}.* is not finite; what was there is kept"):
        AtomicCheckpointIO().save_checkpoint(STATE | damage, written)
    assert same(load_plain(written))
    assert [path.name for path in written.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.fault(17)
def test_a_fit_that_diverges_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    fit(Small(), tmp_path, filename="last", enable_version_counter=False)
    assert load_plain(tmp_path / "last.ckpt")["epoch"] == 1
    with pytest.raises(ModmetaError, match=r"is not written: state_dict\['layer\.(weight|bias)'\] is not finite"):
        fit(Small(float("nan")), tmp_path, filename="last", enable_version_counter=False)
    found = load_plain(tmp_path / "last.ckpt")
    assert found["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in found["state_dict"].values())


def test_a_trainer_resumes_and_keeps_one_checkpoint(tmp_path: Path) -> None:
    best = fit(Small(), tmp_path, monitor="loss", filename="{epoch}").best_model_path
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [Path(best).name] == ["epoch=1.ckpt"]
    kept = fit(Small(), tmp_path, checkpoint=best, epochs=3, monitor="loss", filename="{epoch}")
    assert load_plain(kept.best_model_path)["epoch"] == 2


@pytest.mark.fault(19)
def test_the_last_good_checkpoint_is_not_removed_for_a_damaged_one(tmp_path: Path) -> None:
    plugin = AtomicCheckpointIO()
    first, second, third = (tmp_path / f"{number}.ckpt" for number in range(3))
    plugin.save_checkpoint(STATE, first)
    plugin.save_checkpoint(STATE, second)
    plugin.remove_checkpoint(first)
    assert not first.exists()
    plugin.save_checkpoint(STATE, third)
    third.write_bytes(third.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"1\.ckpt is kept, as the newer checkpoint cannot be read"):
        plugin.remove_checkpoint(second)
    assert same(load_plain(second))


@pytest.mark.fault(21)
def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ModmetaError, match=r"cannot make .*choose another folder"):
        AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "file" / "last.ckpt")
    with pytest.raises(ModmetaError, match="needs a local disk"):
        AtomicCheckpointIO().save_checkpoint(STATE, "s3://bucket/last.ckpt")
    with pytest.raises(ModmetaError, match="does not exist"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "missing.ckpt")
    with pytest.raises(ModmetaError, match="no storage_options"):
        AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "a.ckpt", storage_options={})
