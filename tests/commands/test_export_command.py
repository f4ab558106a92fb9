"""export: from a finished run and an adapter file to files that predict the same without modmeta."""

import csv
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from finished_run import Run
from torch import Tensor

from modmeta.cli import main
from modmeta.commands.images import load_images
from modmeta.serving.export_state_dict import open_state_dict


@pytest.fixture(autouse=True)
def _adapted(tiny_run: Run, _own_folder: None) -> None:
    words = ["--checkpoint", str(tiny_run.checkpoint), "--support", str(tiny_run.support), "--output", "a.safetensors"]
    assert main(["adapt", *words]) == 0


def export(run: Run, format: str, output: str, *more: str) -> int:
    words = ["--checkpoint", str(run.checkpoint), "--adapter", "a.safetensors", "--format", format]
    return main(["export", *words, "--output", output, *more])


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def open_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(path).module()
    return lambda images: module(images)[0]


@pytest.mark.parametrize(
    ("format", "output", "reader"),
    [
        ("state_dict", "m.safetensors", open_state_dict),
        ("torch_export", "m.pt2", open_pt2),
        ("onnx", "m.onnx", open_onnx),
    ],
)
def test_what_is_exported_predicts_what_predict_does(
    format: str,
    output: str,
    reader: Callable[[Path], Callable[[Tensor], Tensor]],
    tiny_run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert export(tiny_run, format, output) == 0
    shown = capsys.readouterr()
    assert "largest difference of a logit from the live model: " in shown.out
    assert f"{output} (" in shown.out
    words = ["--checkpoint", str(tiny_run.checkpoint), "--adapter", "a.safetensors", "--images", str(tiny_run.flat)]
    assert main(["predict", *words, "--output", "p.csv"]) == 0
    with open("p.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    images = load_images([tiny_run.flat / row["image"] for row in rows], 32)
    with torch.no_grad():
        best = reader(Path(output))(images).softmax(-1).max(-1)
    assert ["0123"[index] for index in best.indices] == [row["class"] for row in rows]
    predicted = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(best.values, predicted, atol=1e-4, rtol=0)


def test_nothing_is_overwritten_unasked(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("a.safetensors").read_bytes()
    assert export(tiny_run, "state_dict", "a.safetensors") == 2
    error = capsys.readouterr().err
    assert "a.safetensors exists; choose another name or add --overwrite" in error
    assert len(error.splitlines()) == 1
    assert Path("a.safetensors").read_bytes() == before
    Path("m.pt2").write_text("old")
    assert export(tiny_run, "torch_export", "m.pt2", "--overwrite", "--input", "float32") == 0
    with torch.no_grad():
        assert open_pt2(Path("m.pt2"))(torch.rand(3, 3, 32, 32)).shape == (3, 4)


def test_missing_packages_are_one_line(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("modmeta.serving.export_graph.find_spec", lambda name: None)
    assert export(tiny_run, "onnx", "m.onnx") == 2
    error = capsys.readouterr().err
    assert "--format onnx needs onnx, onnxscript, onnxruntime; pip install 'modmeta[export]'" in error
    assert len(error.splitlines()) == 1
    assert not Path("m.onnx").exists()


def test_an_exported_file_is_no_adapter_file(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tiny_run, "state_dict", "m.safetensors") == 0
    words = ["--checkpoint", str(tiny_run.checkpoint), "--adapter", "m.safetensors", "--images", str(tiny_run.flat)]
    capsys.readouterr()
    assert main(["predict", *words, "--output", "p.csv"]) == 2
    assert "m.safetensors" in capsys.readouterr().err
