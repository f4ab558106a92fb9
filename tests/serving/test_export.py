"""Export: what was written runs without modmeta, and gives what the live model gives."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from modmeta.adaptation import HEADS
from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.adapters.adapter_file import HEAD, AdapterFile
from modmeta.backbone import Backbone
from modmeta.commands.options import export_parser
from modmeta.data.decode import decode_image
from modmeta.errors import ModmetaError
from modmeta.serving.export import FORMATS, Exported, check_output, export_adapter

CLASSES = ("cat", "dog", "émeu")
WAYS = len(CLASSES)
SIZE = 32
MODELS = ("test_resnet", "test_efficientnet", "test_vit", "test_convnext")
OVERLAYS = (
    ("norm_blend", {}), ("film", {}), ("lora", {"rank": 2}), ("bias", {}), ("ia3", {}), ("residual", {}), ("scale", {}),
)  # fmt: skip
SLOTS = (("bottleneck", {}), ("prompt", {"length": 2, "deep": False}), ("projection", {"rank": 4}))
SLOT_NAMES = tuple(name for name, _ in SLOTS)


class Case:
    """An adaptation by hand: modules off the identity, gates between 0 and 1, statistics read off images."""

    def __init__(self, name: str, head: str, slots: bool, size: int = SIZE, taps: tuple[str, ...] = ()) -> None:
        backbone = _backbone(name, size, taps)
        modules = OVERLAYS + SLOTS if slots else OVERLAYS
        configs = [UnitConfig(module, options, group="all") for module, options in modules]
        fitting = [config for config in configs if _fits(backbone, config)]
        self.model = model = AdaptedBackbone(backbone, fitting)
        generator = torch.Generator().manual_seed(0)
        moved = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in model.fresh().items()}
        names = [unit.name for unit in model.units]
        self.gates = {unit: 0.2 + 0.7 * float(torch.rand((), generator=generator)) for unit in names}
        self.gates[names[1]] = 0.0
        self.support = torch.randint(0, 256, (9, 3, size, size), dtype=torch.uint8, generator=generator)
        self.labels = torch.arange(9) % WAYS
        with torch.no_grad():
            _, self.state = model.observe(self.support, moved, self.gates)
            classifier = HEADS.get(head)().fit(self.features(self.support), self.labels, WAYS)
        self.classifier = {key: getattr(classifier, key).detach() for key in HEAD}
        self.normalize = classifier.normalize
        plan = {"units": names, "gates": [self.gates[unit] for unit in names]}
        self.file = AdapterFile(
            CLASSES, plan, self.state, self.classifier, {"normalize": self.normalize}, {"domain": "yard"}
        )
        self.images = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8, generator=generator)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.model(images, self.state, self.gates)

    def live(self, images: Tensor) -> Tensor:
        """The formula that an adapter file documents."""
        x = self.features(images) - self.classifier["center"]
        if self.normalize:
            x = x / x.norm(dim=-1, keepdim=True)
        return self.classifier["scale"] * (x @ self.classifier["weight"] + self.classifier["bias"])

    def export(self, output: Path, format: str, **options: Any) -> Exported:
        return export_adapter(self.model, self.file, output, format, options.pop("live", self.live), **options)


@cache
def _backbone(name: str, size: int, taps: tuple[str, ...] = ()) -> Backbone:
    backbone = Backbone(name, pretrained=False, image_size=size, taps=taps)
    generator = torch.Generator().manual_seed(0)
    for key, buffer in backbone.model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        if key.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    with torch.no_grad():
        backbone.calibrate(backbone(torch.rand(16, 3, size, size, generator=generator)))
    return backbone


def _fits(backbone: Backbone, config: UnitConfig) -> bool:
    try:
        AdaptedBackbone(backbone, [config])
    except ModmetaError:
        return False
    return True


@cache
def case(name: str, head: str = "prototype", slots: bool = False) -> Case:
    return Case(name, head, slots)


@pytest.fixture(autouse=True)
def _hosts_untouched() -> Iterator[None]:
    before = _backbone("test_resnet", SIZE).fingerprint()
    yield
    assert _backbone("test_resnet", SIZE).fingerprint() == before


def normalised(images: Tensor, metadata: dict[str, Any]) -> Tensor:
    mean, std = (torch.tensor(metadata["preprocessing"][key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images / 255 - mean) / std


def metadata_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["modmeta"])


# ---------------------------------------------------------------- state_dict


@pytest.mark.parametrize("name", MODELS)
def test_a_linear_head_and_all_overlays_become_a_plain_timm_model(name: str, tmp_path: Path) -> None:
    adapted = case(name)
    exported = adapted.export(tmp_path / "m.safetensors", "state_dict")
    assert exported.files == (tmp_path / "m.safetensors",)
    assert "timm's own classifier" in exported.note
    metadata = metadata_of(tmp_path / "m.safetensors")
    assert metadata["classes"] == list(CLASSES)
    assert metadata["backbone"] == name
    assert metadata["fingerprint"] == adapted.model.backbone.fingerprint()
    assert metadata["create_model"]["num_classes"] == metadata["num_classes"] == WAYS

    size = {"img_size": SIZE} if name == "test_vit" else {}
    plain = timm.create_model(name, num_classes=WAYS, **size).eval()
    plain.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    with torch.no_grad():
        found = plain(normalised(adapted.images, metadata)).softmax(-1)
    # Squared distances to class means, in units of the support's spread: the head's definition.
    support = adapted.features(adapted.support)
    means = torch.stack([support[adapted.labels == label].mean(0) for label in range(WAYS)])
    spread = (support - support.mean(0)).square().sum(1).mean()
    distances = (adapted.features(adapted.images)[:, None] - means).square().sum(-1)
    torch.testing.assert_close(found, (-10 * distances / spread).softmax(-1), atol=1e-4, rtol=0)
    # The modules matter: without them the features are others.
    untouched = adapted.model(adapted.images, adapted.state, {}).detach()
    assert (untouched - adapted.features(adapted.images)).abs().max() > 1e-2


@pytest.mark.parametrize("head", ["cosine", "ridge", "anchored_ridge"])
def test_a_head_that_timm_cannot_hold_lies_beside_the_backbone(head: str, tmp_path: Path) -> None:
    adapted = case("test_efficientnet", head)
    exported = adapted.export(tmp_path / "m.safetensors", "state_dict")
    assert exported.files == (tmp_path / "m.safetensors", tmp_path / "m.head.safetensors")
    assert "the head is in m.head.safetensors, because the head scales features to unit length" in exported.note
    metadata = metadata_of(tmp_path / "m.safetensors")
    assert metadata["head"] == {"place": "m.head.safetensors", "normalize": True}
    assert metadata_of(tmp_path / "m.head.safetensors")["classes"] == list(CLASSES)

    plain = timm.create_model(**metadata["create_model"]).eval()
    plain.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    tensors = load_file(tmp_path / "m.head.safetensors")
    with torch.no_grad():
        x = plain(normalised(adapted.images, metadata)) - tensors["center"]
    logits = tensors["scale"] * (x / x.norm(dim=-1, keepdim=True) @ tensors["weight"] + tensors["bias"])
    torch.testing.assert_close(logits, adapted.live(adapted.images), atol=1e-4, rtol=0)


def test_both_classifiers_of_a_distilled_model_become_the_head(tmp_path: Path) -> None:
    adapted = Case("deit_tiny_distilled_patch16_224", "prototype", slots=False)
    adapted.export(tmp_path / "m.safetensors", "state_dict")
    plain = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=WAYS, img_size=SIZE).eval()
    plain.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    with torch.no_grad():
        found = plain(normalised(adapted.images, metadata_of(tmp_path / "m.safetensors")))
    torch.testing.assert_close(found.softmax(-1), adapted.live(adapted.images).softmax(-1), atol=1e-4, rtol=0)


def test_a_classifier_with_hidden_layers_is_left_out(tmp_path: Path) -> None:
    adapted = Case("efficientvit_b0", "prototype", slots=False)
    exported = adapted.export(tmp_path / "m.safetensors", "state_dict")
    assert "because timm's classifier of efficientvit_b0 gives other logits" in exported.note
    assert metadata_of(tmp_path / "m.safetensors")["create_model"]["num_classes"] == 0
    assert exported.difference <= 1e-4


def test_slots_do_not_fit_into_a_state_dict(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match=r"units bottleneck@all, projection@all compute .* torch_export or onnx"):
        case("test_resnet", slots=True).export(tmp_path / "m.safetensors", "state_dict")
    assert not list(tmp_path.iterdir())


def test_a_closed_slot_is_no_obstacle(tmp_path: Path) -> None:
    adapted = case("test_resnet", slots=True)
    gates = [0.0 if name.startswith(SLOT_NAMES) else 0.5 for name in adapted.file.plan["units"]]
    plan = {"units": adapted.file.plan["units"], "gates": gates}
    file = AdapterFile(CLASSES, plan, adapted.state, adapted.classifier, {"normalize": False}, {})

    def live(images: Tensor) -> Tensor:
        x = adapted.model(images, adapted.state, dict(zip(plan["units"], gates, strict=True))).detach()
        return adapted.classifier["scale"] * (
            (x - adapted.classifier["center"]) @ adapted.classifier["weight"] + adapted.classifier["bias"]
        )

    assert export_adapter(adapted.model, file, tmp_path / "m.safetensors", "state_dict", live).difference <= 1e-4


def test_the_same_adaptation_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        case("test_convnext", "ridge").export(folder / "m.safetensors", "state_dict")
    assert (tmp_path / "a/m.safetensors").read_bytes() == (tmp_path / "b/m.safetensors").read_bytes()


def test_the_preprocessing_that_is_written_is_what_image_files_go_through(tmp_path: Path) -> None:
    case("test_vit").export(tmp_path / "m.safetensors", "state_dict")
    metadata = metadata_of(tmp_path / "m.safetensors")
    rows, columns = np.mgrid[0:60, 0:90]
    waves = np.stack([np.sin(rows / 7), np.cos(columns / 9), np.sin((rows + columns) / 11)], -1)
    Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(tmp_path / "i.png")
    given = metadata["preprocessing"]
    transform = timm.data.create_transform(
        (3, given["image_size"], given["image_size"]), mean=given["mean"], std=given["std"],
        interpolation=given["interpolation"], crop_pct=given["crop_pct"],
    )  # fmt: skip
    ours = normalised(decode_image(tmp_path / "i.png", SIZE), metadata)
    with Image.open(tmp_path / "i.png") as image:
        theirs = transform(image)
    assert (ours - theirs).abs().max() < 0.05  # two libraries' rounding; another crop would be off by 1


# ---------------------------------------------------------------- graphs


def run_pt2(path: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return torch.export.load(path).module()


def run_onnx(path: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, probabilities = session.run(["logits", "probabilities"], {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(probabilities)

    return run


GRAPHS = {"torch_export": ("m.pt2", run_pt2), "onnx": ("m.onnx", run_onnx)}


@pytest.mark.parametrize("format", GRAPHS)
@pytest.mark.parametrize(
    ("name", "head", "dtype"),
    [("test_resnet", "prototype", torch.uint8), ("test_vit", "anchored_ridge", torch.float32)],
)
def test_a_graph_keeps_slots_head_and_normalisation(
    name: str, head: str, dtype: torch.dtype, format: str, tmp_path: Path
) -> None:
    adapted = case(name, head, slots=True)
    file, run = GRAPHS[format]
    exported = adapted.export(tmp_path / file, format, dtype=dtype)
    assert exported.files == (tmp_path / file,)
    graph = run(tmp_path / file)
    for batch in (1, 2, 5):
        images = adapted.images[:batch]
        given = images if dtype == torch.uint8 else images.float() / 255
        logits, probabilities = graph(given)
        expected = adapted.live(images)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(probabilities, expected.softmax(-1), atol=1e-4, rtol=0)
    slots = [unit for unit in adapted.gates if unit.startswith(SLOT_NAMES)]
    assert len(slots) == (3 if name == "test_vit" else 2)
    for slot in slots:
        without = adapted.model(adapted.images, adapted.state, {**adapted.gates, slot: 0.0}).detach()
        assert (without - adapted.features(adapted.images)).abs().max() > 1e-3


@pytest.mark.parametrize("format", GRAPHS)
def test_a_graph_keeps_taps_and_a_state_dict_cannot(format: str, tmp_path: Path) -> None:
    tapped = Case("test_efficientnet", "ridge", slots=False, taps=("blocks.0", "blocks.1"))
    path = tmp_path / f"model{FORMATS[format].suffix}"
    assert tapped.export(path, format).difference <= 1e-4
    run = run_pt2(path) if format == "torch_export" else run_onnx(path)
    torch.testing.assert_close(run(tapped.images)[0], tapped.live(tapped.images), rtol=0, atol=1e-4)
    with pytest.raises(ModmetaError, match=r"taps read at blocks\.0, blocks\.1"):
        tapped.export(tmp_path / "model.safetensors", "state_dict")


def test_a_graph_carries_its_metadata(tmp_path: Path) -> None:
    adapted = case("test_convnext")
    adapted.export(tmp_path / "m.pt2", "torch_export")
    found = {"modmeta.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=found)
    metadata = json.loads(found["modmeta.json"])
    adapted.export(tmp_path / "m.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert metadata["classes"] == json.loads(properties["classes"]) == list(CLASSES)
    assert metadata["backbone"] == properties["backbone"] == "test_convnext"
    assert metadata["preprocessing"] == json.loads(properties["preprocessing"])
    assert session.get_inputs()[0].shape == ["batch", 3, SIZE, SIZE]
    assert [output.name for output in session.get_outputs()] == ["logits", "probabilities"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_file_that_computes_something_else_is_not_written(wrong: float, tmp_path: Path) -> None:
    adapted = case("test_resnet")
    (tmp_path / "m.safetensors").write_text("precious")
    with pytest.raises(ModmetaError, match=r"differs from the live model by (1\.0e-03|nan) in a logit"):
        adapted.export(tmp_path / "m.safetensors", "state_dict", live=lambda x: adapted.live(x) + wrong, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").read_text() == "precious"


@pytest.mark.parametrize(
    ("output", "format", "expected"),
    [
        ("m.pt2", "onnx", "should end with .onnx for --format onnx"),
        ("nowhere/m.onnx", "onnx", "nowhere does not exist"),
        ("there.safetensors", "state_dict", "there.safetensors exists; choose another name or add --overwrite"),
        ("half.safetensors", "state_dict", "half.head.safetensors exists"),
        ("m.onnx", "onxx", "did you mean 'onnx'"),
    ],
)
def test_outputs_that_cannot_be_used(output: str, format: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").touch()
    (tmp_path / "half.head.safetensors").touch()
    with pytest.raises(ModmetaError, match=expected):
        check_output(tmp_path / output, format, overwrite=False)
    check_output(tmp_path / "there.safetensors", "state_dict", overwrite=True)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modmeta.serving.export_graph.find_spec", lambda name: None if "runtime" in name else name)
    with pytest.raises(ModmetaError, match=r"needs onnxruntime; pip install 'modmeta\[export\]'"):
        check_output(tmp_path / "m.onnx", "onnx", overwrite=False)


def test_a_backbone_that_cannot_be_traced_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("data-dependent")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ModmetaError, match=r"'test_resnet' cannot be traced .*data-dependent\); use --format state"):
        case("test_resnet").export(tmp_path / "m.pt2", "torch_export")
    with pytest.raises(ModmetaError, match=r"units bottleneck@all, projection@all may be why"):
        case("test_resnet", slots=True).export(tmp_path / "m.pt2", "torch_export")
    assert not list(tmp_path.iterdir())


def test_the_command_line_offers_every_format() -> None:
    for format in FORMATS:
        words = ["--checkpoint", "c", "--adapter", "a", "--output", "o", "--format", format]
        assert export_parser().parse_args(words).format == format
