"""Adapter files from hostile hands: thousands of mutations of a valid one, all of which must be refused or harmless.

    python benchmarks/adapter_files.py --count 10000

A mutated file is *refused* with one line of text, or it is *harmless*: it loads as exactly what it says, which is the
original content unless the mutation rewrote a free text and signed the file anew. Anything else that loads is *wrong*;
any exception but a ``ModmetaError`` is a *crash*. Pickles carry code that would leave a file behind. A refusal may take
100 ms of processor time; the time by the clock is printed, too, and is longer where other programs run.
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import random
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from modmeta.adaptation import Adapted, Classifier, Plan
from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.adapters.adapter_file import AdapterFile, read_adapter, tensor_digest, write_adapter
from modmeta.adapters.header import canonical, checksum
from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError

CLASSES = ("cat", "dog", "emu")
LIMIT_MS = 100.0
LONGEST = 1000  # characters of a refusal, path included


@dataclass
class Parts:
    """An adapter file taken apart, to be put together again with something changed."""

    tensors: dict[str, Any]
    metadata: dict[str, Any]
    body: bytearray

    @classmethod
    def of(cls, data: bytes) -> Parts:
        """Take the bytes of a file apart."""
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return cls(header, json.loads(header.pop("__metadata__")["modmeta"]), bytearray(data[8 + length :]))

    def together(self, *, sign: bool, **more: Any) -> bytes:
        """Return the bytes; ``sign`` makes both checksums right again, as only a forger would."""
        if sign:
            self.metadata.pop("checksum", None)
            self.metadata["tensors"] = self._digest()
            self.metadata["checksum"] = checksum(self.metadata)
        return framed(json.dumps({"__metadata__": {"modmeta": canonical(self.metadata)}, **self.tensors, **more}),
                      bytes(self.body))  # fmt: skip

    def _digest(self) -> str:
        try:
            return tensor_digest(load(framed(json.dumps(self.tensors), bytes(self.body))))
        except Exception:  # what cannot be loaded has no digest; the header must give it away
            return str(self.metadata["tensors"])


@dataclass(frozen=True)
class Mutant:
    """Mutated bytes, and what they should load as where they say something new and valid."""

    data: bytes
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tally:
    """What became of the files of one kind of mutation."""

    count: int = 0
    refused: int = 0
    harmless: int = 0
    wrong: int = 0
    crashed: int = 0
    slowest_ms: float = 0.0
    slowest_cpu_ms: float = 0.0
    example: str = ""


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def framed(header: str | bytes, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def split(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


# ---------------------------------------------------------------------- mutations of bytes


def truncated(rng: random.Random, data: bytes, trace: Path) -> bytes:
    return data[: rng.randrange(len(data))]


def trailing_bytes(rng: random.Random, data: bytes, trace: Path) -> bytes:
    return data + rng.randbytes(rng.choice((1, 4, 8, 1000)))


def flipped_bits(rng: random.Random, data: bytes, trace: Path) -> bytes:
    return flip(rng, data, 0, len(data), rng.choice((1, 1, 2, 8)))


def flipped_header(rng: random.Random, data: bytes, trace: Path) -> bytes:
    return flip(rng, data, 8, 8 + len(split(data)[0]), rng.choice((1, 1, 2, 8)))


def flipped_payload(rng: random.Random, data: bytes, trace: Path) -> bytes:
    return flip(rng, data, len(data) - len(split(data)[1]), len(data), rng.choice((1, 1, 2, 8)))


def flip(rng: random.Random, data: bytes, low: int, high: int, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def spliced(rng: random.Random, data: bytes, trace: Path) -> bytes:
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    return rng.choice((data[:a] + data[b:], data[:b] + data[a:], data[:a] + rng.randbytes(b - a) + data[b:]))


def random_bytes(rng: random.Random, data: bytes, trace: Path) -> bytes:
    return rng.randbytes(rng.choice((1, 7, 8, 9, 100, 10_000)))


def zero_length(rng: random.Random, data: bytes, trace: Path) -> bytes:
    return b""


def header_length_lies(rng: random.Random, data: bytes, trace: Path) -> bytes:
    header, body = split(data)
    right = len(header)
    lie = rng.choice((0, 1, right - 1, right + 1, right + 8, len(data), 2**20, 2**20 + 1, 2**31, 2**63, 2**64 - 1))
    return framed(header, body, lie)


def pickles(rng: random.Random, data: bytes, trace: Path) -> bytes:
    payload = pickle.dumps(Bomb(trace), protocol=rng.randrange(6))
    header, body = split(data)
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3")
    return rng.choice((payload, payload + data, packed.getvalue(), framed(payload, body), framed(header, payload)))


def foreign(rng: random.Random, data: bytes, trace: Path) -> bytes:
    tensors = {"weight": torch.zeros(rng.randrange(1, 9))}
    text = split(data)[0].decode()
    return save(tensors, rng.choice((None, {"format": "pt"}, {"modmeta": "{}"}, {"modmeta": "[]"}, {"modmeta": text})))


# ---------------------------------------------------------------------- mutations of the JSON text


def duplicate_key(rng: random.Random, data: bytes, trace: Path) -> bytes:
    header, body = split(data)
    name, value = rng.choice(list(json.loads(header).items()))
    inner = rng.random() < 0.5
    if inner:  # within modmeta's own metadata
        parts = Parts.of(data)
        key, old = rng.choice(list(parts.metadata.items()))
        text = canonical(parts.metadata)[:-1] + f",{json.dumps(key)}:{json.dumps(old)}}}"
        return framed(json.dumps({"__metadata__": {"modmeta": text}, **parts.tensors}), body)
    return framed(header.rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(value)}}}".encode(), body)


def deep_json(rng: random.Random, data: bytes, trace: Path) -> bytes:
    depth = rng.choice((100, 900, 1_100, 10_000, 200_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    nest = opening * depth + "1" + closing * depth
    parts = Parts.of(data)
    if rng.random() < 0.5:
        return framed(json.dumps(parts.tensors)[:-1] + f',"deep":{nest}}}', bytes(parts.body))
    text = canonical(parts.metadata)[:-1] + f',"zz":{nest}}}'
    return framed(json.dumps({"__metadata__": {"modmeta": text}, **parts.tensors}), bytes(parts.body))


def other_json(rng: random.Random, data: bytes, trace: Path) -> bytes:
    header, body = split(data)
    spelled = json.dumps(json.loads(header), indent=rng.choice((None, 1, 4)))
    utf = rng.choice(("utf-8", "utf-8-sig", "utf-16", "utf-32"))
    return framed(rng.choice((header + b" " * rng.randrange(100), b" " + header, spelled.encode(utf))), body)


# ---------------------------------------------------------------------- mutations of the tensors, signed or not


def renamed_tensor(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    name = rng.choice(list(parts.tensors))
    odd = ("", "state:", "../" + name, "\n", "\u6f22", "head:gamma")
    new = rng.choice((name + "x", name[1:], name.replace("|", "/"), *odd))
    parts.tensors[new] = parts.tensors.pop(name)
    return parts.together(sign=rng.random() < 0.5)


def resized_tensor(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    entry = rng.choice(list(parts.tensors.values()))
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        (shape[:-1], [*shape, 1], [1, *shape], [2 * n for n in [*shape, 1]], [n + 1 for n in [*shape, 0]], [0], [-1])
    )
    return parts.together(sign=rng.random() < 0.5)


def huge_shape(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    entry = rng.choice(list(parts.tensors.values()))
    entry["shape"] = rng.choice(([2**31, 2**31], [2**62], [2**63, 2], [10**30], [1] * 100_000, [2**20] * 8, 10**9))
    if rng.random() < 0.5:
        entry["data_offsets"] = [0, rng.choice((2**40, 2**63, 2**64, 10**30))]
    return parts.together(sign=rng.random() < 0.5)


def missing_or_extra_tensor(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    tensors = load(data)
    if rng.random() < 0.5:
        del tensors[rng.choice(list(tensors))]
    else:
        tensors[rng.choice(("state:more", "head:more", "more", "pickle"))] = torch.zeros(rng.randrange(4))
    changed = Parts.of(save(tensors, {"modmeta": canonical(parts.metadata)}))
    return changed.together(sign=rng.random() < 0.5)


def other_dtype(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    entry = rng.choice(list(parts.tensors.values()))
    entry["dtype"] = rng.choice(("I32", "U32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "f32", "O", "", None, 1))
    return parts.together(sign=rng.random() < 0.5)


def offsets(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    entry, other = rng.sample(list(parts.tensors.values()), 2)
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        ([begin + 4, end + 4], [begin - 4, end - 4], [end, begin], [begin, end + 2**32], [0, end - begin],
         [begin, end, end], [begin], [], None, "0", [float(begin), end], [begin, -1], list(other["data_offsets"]))
    )  # fmt: skip
    if rng.random() < 0.3:
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], [begin, end]
    return parts.together(sign=False)


def not_finite_and_signed(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    for _ in range(rng.choice((1, 1, 5))):
        position = 4 * rng.randrange(len(parts.body) // 4)
        value = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\x01\x00\x80\x7f"))
        parts.body[position : position + 4] = value
    return parts.together(sign=True)


# ---------------------------------------------------------------------- mutations of the metadata

ODD: tuple[Any, ...] = (None, True, -1, 10**400, 1.5, "", "x", [], {}, [[]], {"a": 1}, [None], "\u202e", "\ud800")


def field_removed_or_retyped(rng: random.Random, data: bytes, trace: Path) -> bytes:
    """Change one of the entries at the top level and sign the file anew."""
    parts = Parts.of(data)
    key = rng.choice([key for key in parts.metadata if key not in ("tensors", "checksum", "provenance")])
    old = parts.metadata.pop(key)
    how = rng.randrange(3)
    if how == 1:
        parts.metadata[key + "s"] = old
    if how == 2:
        parts.metadata[key] = rng.choice([odd for odd in ODD if odd != old])
    return parts.together(sign=True)


def edited_unsigned(rng: random.Random, data: bytes, trace: Path) -> bytes:
    """Change a text or number anywhere in the metadata and leave the checksum as it was."""
    parts = Parts.of(data)
    holder, key = rng.choice(list(leaves(parts.metadata)))
    old = holder[key]
    holder[key] = rng.choice((old + 1 if isinstance(old, (int, float)) else f"{old}a", *ODD[:3]))
    return parts.together(sign=False)


def leaves(data: Any) -> Any:
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(value, (dict, list)):
            yield from leaves(value)
        else:
            yield data, key


def foreign_backbone_and_signed(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    backbone = parts.metadata["backbone"]
    key = rng.choice(list(backbone))
    backbone[key] = rng.choice((f"{backbone[key]}\n", "sha256:0", "a" * 10_000, *ODD))
    return parts.together(sign=True)


def foreign_units_and_signed(rng: random.Random, data: bytes, trace: Path) -> bytes:
    """Change the description of an open unit."""
    parts = Parts.of(data)
    plan = parts.metadata["plan"]
    active = {name for name, gate in zip(plan["units"], plan["gates"], strict=True) if gate > 0}
    units = parts.metadata["units"]
    row = rng.choice([row for row, unit in enumerate(units) if unit["name"] in active])
    match rng.randrange(6):
        case 0:
            units[row]["module"] = rng.choice(("os.system", "flim", "modmeta_modules.film:FiLM", "../film", *ODD))
        case 1:
            units[row]["options"] = rng.choice(({"rank": 10**9}, {"rank": "${oc.env:HOME}"}, *ODD[:4]))
        case 2:
            units[row]["sites"] = rng.choice(([], ["nowhere"], [*units[row]["sites"], "x"], *ODD[:4]))
        case 3:
            units[row]["name"] = rng.choice(("", "film@none", *ODD))
        case 4:
            units[row] = rng.choice(ODD)
        case _:
            units.append(deepcopy(units[row]))
    return parts.together(sign=True)


def impossible_plan_and_signed(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    plan = parts.metadata["plan"]
    match rng.randrange(5):
        case 0:
            wrong = (-0.1, 1.1, 1e308, 10**400, True, None, "1", [1.0], "nan")
            plan["gates"][rng.randrange(len(plan["gates"]))] = rng.choice(wrong)
        case 1:
            plan.pop(rng.choice(list(plan)))
        case 2:
            key = rng.choice([key for key in plan if key != "units"])
            plan[key] = rng.choice(([], [[[]]], "x", {}, None, [1e300], 1e300, [[1.0]] * 99, 10**400, ["${a}"]))
        case 3:
            plan["units"] = rng.choice(([], plan["units"][::-1], [None], plan["units"] + ["x"], [plan["units"]]))
        case _:
            plan["more"] = [1.0]
    return parts.together(sign=True)


def impossible_classes_and_signed(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    classes = parts.metadata["classes"]
    if rng.random() < 0.3:
        parts.metadata["classes"] = rng.choice(([], classes[:-1], [*classes, "more"], classes[:1] * len(classes)))
    else:
        odd = ("", "\n", "\x1b[31m", "a\u202eb", "\ud800", "\x00", "x" * 257, None, 1, ["cat"], "\u2028", "\ufeff")
        classes[rng.randrange(len(classes))] = rng.choice(odd)
    return parts.together(sign=True)


def impossible_head_and_signed(rng: random.Random, data: bytes, trace: Path) -> bytes:
    parts = Parts.of(data)
    parts.metadata["head"] = rng.choice(
        ({}, {"normalize": 1}, {"normalize": "true"}, {"normalize": None}, {"normalize": True, "more": 1}, {"x": True})
    )
    return parts.together(sign=True)


def unicode_text(rng: random.Random, data: bytes, trace: Path) -> Mutant:
    """Name a class with any printable letters, and sign: they must come out as they went in."""
    parts = Parts.of(data)
    letters = [chr(code) for code in (rng.randrange(32, 0x110000) for _ in range(20)) if chr(code).isprintable()]
    parts.metadata["classes"][0] = "".join(letters) or "é"
    return Mutant(parts.together(sign=True), {"classes": tuple(parts.metadata["classes"])})


def interpolation(rng: random.Random, data: bytes, trace: Path) -> Mutant:
    """Put what a configuration would resolve into free texts, and sign: it must stay the text that it is."""
    parts = Parts.of(data)
    forms = ("${oc.env:HOME}", "${oc.env:PATH}", "${classes.0}", "$HOME", "{0}", "%(home)s", "!!python/name:os")
    text = rng.choice(forms)
    if rng.random() < 0.5:
        parts.metadata["classes"][0] = text
        return Mutant(parts.together(sign=True), {"classes": tuple(parts.metadata["classes"])})
    parts.metadata["provenance"] = {"domain": text}
    return Mutant(parts.together(sign=True), {"provenance": {"domain": text}})


MUTATIONS: tuple[Callable[[random.Random, bytes, Path], bytes | Mutant], ...] = (
    truncated, trailing_bytes, flipped_bits, flipped_header, flipped_payload, spliced, random_bytes, zero_length,
    header_length_lies, pickles, foreign, duplicate_key, deep_json, other_json, renamed_tensor, resized_tensor,
    huge_shape, missing_or_extra_tensor, other_dtype, offsets, not_finite_and_signed, field_removed_or_retyped,
    edited_unsigned, foreign_backbone_and_signed, foreign_units_and_signed, impossible_plan_and_signed,
    impossible_classes_and_signed, impossible_head_and_signed, unicode_text, interpolation,
)  # fmt: skip


# ---------------------------------------------------------------------- the run


def original(folder: Path, backbone: str, image_size: int | None, seed: int) -> tuple[AdaptedBackbone, Path]:
    """Write a valid adapter file with open and closed units."""
    units = [UnitConfig("film", depth=(0.5, 1.0)), UnitConfig("norm_blend", group="all"), UnitConfig("projection")]
    model = AdaptedBackbone(Backbone(backbone, False, image_size), units)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    names, width = tuple(unit.name for unit in model.units), model.backbone.feature_dim
    gates = torch.tensor([0.0 if name.startswith("norm_blend") else 0.5 for name in names])
    rates, bank = torch.full((len(names), 3), 0.02), torch.ones(len(names), 1)
    scalar = torch.tensor(0.5)
    plan = Plan(names, gates, rates, torch.zeros(len(names)), bank, scalar, scalar, scalar)
    classifier = Classifier(draw(width, 3), draw(3), draw(width), torch.tensor(10.0), True)
    state = {name: 0.1 * draw(*tensor.shape) for name, tensor in model.fresh().items()}
    path = folder / "original.safetensors"
    write_adapter(path, model, Adapted(state, plan, classifier, CLASSES).to_file({"domain": "sketch", "images": 15}))
    return model, path


def same(found: AdapterFile, expected: AdapterFile) -> bool:
    plain = ("classes", "plan", "head", "provenance")
    if any(getattr(found, name) != getattr(expected, name) for name in plain):
        return False
    pairs = ((found.state, expected.state), (found.classifier, expected.classifier))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b) for a, b in pairs)


def fuzz(folder: Path, model: AdaptedBackbone, path: Path, count: int, seed: int) -> dict[str, Tally]:
    """Make ``count`` files, each kind of mutation in turn, and try to load every one."""
    data, trace, file = path.read_bytes(), folder / "code-was-run", folder / "mutated.safetensors"
    expected = read_adapter(path, model)
    tallies = {mutation.__name__: Tally() for mutation in MUTATIONS}
    for index in range(count):
        mutation = MUTATIONS[index % len(MUTATIONS)]
        made = mutation(random.Random(f"{seed}/{index}"), data, trace)
        mutant = made if isinstance(made, Mutant) else Mutant(made)
        file.write_bytes(mutant.data)
        tally = tallies[mutation.__name__]
        tally.count += 1
        begin, cpu = time.perf_counter(), time.thread_time()
        try:
            found = read_adapter(file, model)
            Adapted.from_file(found)
        except ModmetaError as error:
            tally.slowest_ms = max(tally.slowest_ms, 1e3 * (time.perf_counter() - begin))
            tally.slowest_cpu_ms = max(tally.slowest_cpu_ms, 1e3 * (time.thread_time() - cpu))
            text = str(error)
            fine = len(text) <= LONGEST and text.isprintable()
            tally.refused += fine
            tally.crashed += not fine
            tally.example = tally.example if fine else f"file {index}: {text[:200]!r}"
        except Exception as error:
            tally.crashed += 1
            tally.example = f"file {index}: {type(error).__name__}: {str(error)[:200]!r}"
        else:
            fine = same(found, replace(expected, **mutant.changes))
            tally.harmless += fine
            tally.wrong += not fine
            tally.example = tally.example if fine else f"file {index} loads as something else"
    if trace.exists():
        raise SystemExit("a pickle ran its code")
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="timm model, with random weights")
    parser.add_argument("--image-size", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, path = original(folder, options.backbone, options.image_size, options.seed)
        gc.freeze()  # whichever file sets off a full collection would pay for all that torch has ever imported
        kilobytes = path.stat().st_size / 1000
        tallies = fuzz(folder, model, path, options.count, options.seed)
        gc.unfreeze()
    columns = ("count", "refused", "harmless", "wrong", "crashed")
    total = {column: sum(getattr(tally, column) for tally in tallies.values()) for column in columns}
    times = ("slowest_ms", "slowest_cpu_ms")
    slowest = {name: max(getattr(tally, name) for tally in tallies.values()) for name in times}
    print(f"{options.count} mutations of a {kilobytes:.0f} kB file for {options.backbone}, seed {options.seed}\n")
    print("| mutation | " + " | ".join(columns) + " | slowest refusal, ms | of it on the processor |")
    print("|---|" + "---|" * (len(columns) + 2))
    for kind, tally in tallies.items():
        cells = [str(getattr(tally, column)) for column in columns]
        cells += [f"{getattr(tally, name):.1f}" for name in times]
        print(f"| {kind.replace('_', ' ')} | {' | '.join(cells)} |")
    both = " | ".join(f"{number:.1f}" for number in slowest.values())
    print(f"| **all** | {' | '.join(str(number) for number in total.values())} | {both} |")
    examples = [f"{kind}: {tally.example}" for kind, tally in tallies.items() if tally.example]
    if total["wrong"] or total["crashed"] or slowest["slowest_cpu_ms"] > LIMIT_MS:
        raise SystemExit("\n".join(["", "FAILED", *examples]))


if __name__ == "__main__":
    main()
