"""The adapter file: equal bytes for equal content, and nothing damaged or foreign gets through."""

import json
import math
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.adapters.adapter_file import FORMAT, AdapterFile, read_adapter, tensor_digest, write_adapter
from modmeta.adapters.header import canonical, checksum
from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError

CLASSES = ("cat", "dog", "<b>|emu")


@pytest.fixture(scope="module")
def model() -> AdaptedBackbone:
    units = [UnitConfig("film", group="all"), UnitConfig("projection", {"rank": 2})]
    return AdaptedBackbone(Backbone("test_efficientnet", False, 32), units)


@pytest.fixture(scope="module")
def content(model: AdaptedBackbone) -> AdapterFile:
    generator = torch.Generator().manual_seed(0)
    width = model.backbone.feature_dim
    return AdapterFile(
        classes=CLASSES,
        plan={"units": [unit.name for unit in model.units], "gates": [0.5, 0.0], "rates": [[0.1], [0.1]]},
        state={name: torch.randn(t.shape, generator=generator) for name, t in model.fresh().items()},
        classifier={
            "weight": torch.randn(width, 3, generator=generator),
            "bias": torch.zeros(3),
            "center": torch.randn(width, generator=generator),
            "scale": torch.tensor(10.0),
        },
        head={"normalize": True},
        provenance={"domain": "sketch"},
    )


@pytest.fixture
def written(tmp_path: Path, model: AdaptedBackbone, content: AdapterFile) -> Path:
    path = tmp_path / "a.safetensors"
    write_adapter(path, model, content)
    return path


def test_round_trip(written: Path, model: AdaptedBackbone, content: AdapterFile) -> None:
    found = read_adapter(written, model)
    assert (found.classes, found.plan, found.head) == (CLASSES, content.plan, content.head)
    assert found.provenance == content.provenance
    assert all(torch.equal(found.classifier[name], t) for name, t in content.classifier.items())
    assert found.state
    assert all(torch.equal(t, content.state[name]) for name, t in found.state.items())
    # The closed unit's tensors are not kept.
    assert all(name.startswith("film@all|") for name in found.state)


def test_equal_content_gives_equal_bytes(
    written: Path, model: AdaptedBackbone, content: AdapterFile, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "b.safetensors", model, content)
    assert (tmp_path / "b.safetensors").read_bytes() == written.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_the_file_has_the_rights_that_the_umask_leaves(written: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(written.stat().st_mode) == 0o666 & ~mask


@pytest.mark.fault(17)
@pytest.mark.parametrize("where", ["state", "classifier", "plan"])
def test_numbers_that_are_not_finite_are_never_written(
    where: str, model: AdaptedBackbone, content: AdapterFile, tmp_path: Path
) -> None:
    old = getattr(content, where)
    if where == "plan":
        new = old | {"gain": math.nan}
    else:
        name = next(iter(old))
        new = old | {name: torch.full_like(old[name], math.nan)}
    with pytest.raises(ModmetaError, match="not finite"):
        write_adapter(tmp_path / "a.safetensors", model, AdapterFile(**{**vars(content), where: new}))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist(model: AdaptedBackbone, content: AdapterFile, tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match="cannot write to"):
        write_adapter(tmp_path / "nowhere" / "a.safetensors", model, content)


def signed(metadata: dict[str, Any]) -> str:
    """Return metadata as a file holds it, with the checksum that belongs to it."""
    metadata = {key: value for key, value in metadata.items() if key != "checksum"}
    return canonical(metadata | {"checksum": checksum(metadata)})


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]

    def with_metadata(**changes: object) -> bytes:
        full = json.loads(header)
        full["__metadata__"]["modmeta"] = signed(json.loads(full["__metadata__"]["modmeta"]) | changes)
        return with_header(json.dumps(full).encode())

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + body

    match how:
        case "empty":
            data = b""
        case "truncated":
            data = data[:-5]
        case "trailing bytes":
            data += b"more"
        case "flipped bit":
            data = data[:-1] + bytes([data[-1] ^ 1])
        case "pickle":
            data = pickle.dumps({"a": list(range(100))})
        case "zip":
            data = b"PK\x03\x04" + bytes(100)
        case "huge header":
            data = (2**21).to_bytes(8, "little") + bytes(2**21)
        case "foreign":
            data = save({"a": torch.zeros(2)}, {"format": "pt"})
        case "no metadata":
            data = save({"a": torch.zeros(2)})
        case "two metadata keys":
            full = json.loads(header)
            full["__metadata__"]["more"] = "x"
            data = with_header(json.dumps(full).encode())
        case "double key":
            data = with_header(header.replace(b'{"__metadata__":', b'{"__metadata__":{},"__metadata__":', 1))
        case "not JSON":
            data = with_header(b"{]" + header)
        case "newer format":
            data = with_metadata(format=FORMAT + 1)
        case "older format":
            data = with_metadata(format=1)
        case "edited text":
            data = data.replace(b"sketch", b"sketsh")
        case "no number":
            data = with_header(header.replace(b"0.1]", b"1e999]", 1))
        case "half a surrogate pair":
            data = with_metadata(provenance={"domain": "\ud800"})
        case "spelled differently":
            full = json.loads(header)
            full["__metadata__"]["modmeta"] += " "
            data = with_header(json.dumps(full).encode())
        case "another encoding":
            data = with_header(header.decode().encode("utf-16"))
        case "a gate of text":
            data = with_metadata(plan={"units": ["film@all", "projection@features"], "gates": ["1", 0.0]})
        case "a gate too wide":
            data = with_metadata(plan={"units": ["film@all", "projection@features"], "gates": [2, 0.0]})
        case "unknown module":
            units = json.loads(json.loads(header)["__metadata__"]["modmeta"])["units"]
            data = with_metadata(units=[units[0] | {"module": "stretch"}, units[1]])
        case "a class twice":
            data = with_metadata(classes=["cat", "dog", "cat"])
        case "no plan":
            data = with_metadata(plan={})
        case "unknown unit":
            data = with_metadata(plan={"units": ["lora@all"], "gates": [1.0]})
        case "other options":
            units = json.loads(json.loads(header)["__metadata__"]["modmeta"])["units"]
            data = with_metadata(units=[units[0] | {"options": {"rank": 3}}, units[1]])
        case "more units active":
            plan = json.loads(json.loads(header)["__metadata__"]["modmeta"])["plan"]
            data = with_metadata(plan=plan | {"gates": [0.5, 0.5]})
        case "fewer classes":
            data = with_metadata(classes=["cat"])
        case "control characters":
            data = with_metadata(classes=["cat", "dog", "\x1b[31m"])
        case "missing entry":
            data = with_metadata(head=None)
        case "other fingerprint":
            backbone = json.loads(json.loads(header)["__metadata__"]["modmeta"])["backbone"]
            data = with_metadata(backbone=backbone | {"fingerprint": "sha256:0"})
        case "other hash":
            data = with_metadata(tensors="sha256:0")
    path.write_bytes(data)


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("empty", "no safetensors file"),
        ("truncated", "is damaged"),
        ("trailing bytes", "is damaged"),
        ("flipped bit", "checksum"),
        ("pickle", "pickled file"),
        ("zip", "pickled file"),
        ("huge header", "no safetensors file"),
        ("foreign", "not of modmeta"),
        ("no metadata", "not of modmeta"),
        ("two metadata keys", "not of modmeta"),
        ("double key", "occurs twice"),
        ("not JSON", "no valid JSON"),
        ("newer format", "its format is 3, not 2"),
        ("older format", "its format is 1, not 2"),
        ("edited text", "its metadata does not have the checksum"),
        ("no number", "no finite number"),
        ("half a surrogate pair", "no valid JSON"),
        ("spelled differently", "not in the form"),
        ("another encoding", "no valid JSON"),
        ("unknown module", "needs the adapter module 'stretch', which is unknown here"),
        ("a class twice", "not distinct"),
        ("no plan", "does not give a gate"),
        ("a gate of text", r"no number in 0\.\.1"),
        ("a gate too wide", r"no number in 0\.\.1"),
        ("unknown unit", "plan and its list of units do not agree"),
        ("other options", "no such unit 'film@all'"),
        ("more units active", "'missing'|missing"),
        ("fewer classes", "head:bias"),
        ("control characters", "printable"),
        ("missing entry", "'head' is missing"),
        ("other fingerprint", "for another backbone: its fingerprint"),
        ("other hash", "checksum"),
    ],
)
def test_damaged_and_foreign_files_are_refused(how: str, expected: str, written: Path, model: AdaptedBackbone) -> None:
    damage(written, how)
    with pytest.raises(ModmetaError, match=expected) as caught:
        read_adapter(written, model)
    assert "\n" not in str(caught.value)
    assert written.name in str(caught.value)


@pytest.mark.fault(26)
def test_a_tensor_that_is_not_finite_is_refused(written: Path, model: AdaptedBackbone) -> None:
    data = bytearray(written.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN in place of the last number
    length = int.from_bytes(data[:8], "little")
    tensors = load(bytes(data))
    metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["modmeta"])
    written.write_bytes(save(tensors, {"modmeta": signed(metadata | {"tensors": tensor_digest(tensors)})}))
    with pytest.raises(ModmetaError, match="is not finite"):
        read_adapter(written, model)


@pytest.mark.parametrize("classes", [("cat", "cat", "emu"), ("cat", "dog", "a\nb"), ("cat", "dog", "")])
def test_what_could_not_be_read_is_not_written(
    classes: tuple[str, ...], model: AdaptedBackbone, content: AdapterFile, tmp_path: Path
) -> None:
    with pytest.raises(ModmetaError, match="nothing was written"):
        write_adapter(tmp_path / "a.safetensors", model, AdapterFile(**{**vars(content), "classes": classes}))
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(26)
def test_no_tensor_is_read_before_the_header_is_found_right(
    written: Path, model: AdaptedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(data: bytes) -> None:
        raise AssertionError(f"{len(data)} bytes were taken for tensors")

    monkeypatch.setattr("modmeta.adapters.adapter_file.load", never)
    with pytest.raises(AssertionError, match="taken for tensors"):
        read_adapter(written, model)
    with written.open("ab") as stream:
        stream.truncate(2**33)  # a hole of 8 GB, which no disk has to hold and nobody may read
    with pytest.raises(ModmetaError, match="size is not that of its tensors"):
        read_adapter(written, model)


def test_what_a_message_shows_of_a_file_is_short_and_printable(written: Path, model: AdaptedBackbone) -> None:
    data = written.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["modmeta"])
    metadata["backbone"]["fingerprint"] = "\x1b[31m\n" + 10_000 * "a"
    header["__metadata__"]["modmeta"] = signed(metadata)
    text = json.dumps(header).encode()
    written.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ModmetaError, match="another backbone") as caught:
        read_adapter(written, model)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


def test_a_folder_is_no_file(tmp_path: Path, model: AdaptedBackbone) -> None:
    with pytest.raises(ModmetaError, match="does not exist"):
        read_adapter(tmp_path, model)
    with pytest.raises(ModmetaError, match="cannot be read"):
        read_adapter(tmp_path / ("a" * 300), model)


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("name", "size", "seed", "what"),
    [
        ("test_efficientnet", 32, 1, "fingerprint is sha256:.*, that of this checkpoint sha256:"),
        ("test_efficientnet", 64, 0, "preprocessing is .*'image_size': 32.*, that of this .*'image_size': 64"),
        ("test_efficientnet_gn", 32, 0, "name is test_efficientnet, that of this checkpoint test_efficientnet_gn"),
    ],
)
def test_another_backbone_is_refused(name: str, size: int, seed: int, what: str, written: Path) -> None:
    units = [UnitConfig("film", group="all"), UnitConfig("projection", {"rank": 2})]
    other = AdaptedBackbone(Backbone(name, False, size, seed=seed), units)
    with pytest.raises(ModmetaError, match=f"for another backbone: its {what}"):
        read_adapter(written, other)


@pytest.mark.fault(29)
def test_other_options_of_a_module_are_refused(written: Path, model: AdaptedBackbone, content: AdapterFile) -> None:
    plan = content.plan | {"gates": [0.0, 1.0]}
    write_adapter(written, model, AdapterFile(**{**vars(content), "plan": plan}))
    units = [UnitConfig("film", group="all"), UnitConfig("projection", {"rank": 3})]
    other = AdaptedBackbone(Backbone("test_efficientnet", False, 32), units)
    with pytest.raises(ModmetaError, match="no such unit 'projection@features'"):
        read_adapter(written, other)
