"""What a user writes is refused before any data are read, unless every key exists and every value makes sense."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from modmeta.cli import main
from modmeta.commands.arguments import Arguments
from modmeta.commands.fit import CommandLine
from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
INIT = "model.init_args"
OPEN_STORE = DomainDataModule._open_store


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DomainDataModule, "_open_store", lambda self: pytest.fail("data were read"))


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line that a command line is refused with."""
    capsys.readouterr()
    assert main(["fit", *words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("modmeta: error: ")]
    return line


def edited(config: Path, key: str, value: Any) -> str:
    """Write a configuration with another value of a key, and return its name."""
    content = yaml.safe_load(config.read_text())
    *groups, last = key.split(".")
    place = content
    for group in groups:
        place = place.setdefault(group, {})
    place[last] = value
    Path("edited.yaml").write_text(yaml.safe_dump(content))
    return "edited.yaml"


KEYS = [
    ("trainr", {}, "unknown key trainr; did you mean trainer?"),
    ("steps_per_epoch", 3, "unknown key steps_per_epoch; did you mean data.steps_per_epoch?"),
    ("data.rot", {}, "unknown key data.rot; did you mean data.root?"),
    ("data._target_", "os.system", "unknown key data._target_; known: "),
    ("model.init_arg", {"head": "ridge"}, "unknown key model.init_arg; did you mean model.init_args?"),
    ("model.dict_kwargs", {"a": 1}, "unknown key model.dict_kwargs; "),
    (f"{INIT}.sourse", {}, f"unknown key {INIT}.sourse; did you mean {INIT}.source?"),
    (f"{INIT}.sourse", None, f"unknown key {INIT}.sourse; did you mean {INIT}.source?"),
    (f"{INIT}.source.epoch", 1, f"unknown key {INIT}.source.epoch; did you mean {INIT}.source.epochs?"),
    (f"{INIT}.units", [{"module": "film", "optons": {}}], f"{INIT}.units.optons; did you mean {INIT}.units.options?"),
    (
        "trainer.logger",
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"nam": {}}},
        "unknown key trainer.logger.init_args.nam; did you mean trainer.logger.init_args.name?",
    ),
    (f"{INIT}.head_options", {"scal": 1.0}, "unknown option of head 'anchored_ridge': 'scal'; did you mean 'scale'?"),
    (f"{INIT}.units", [{"module": "lora", "options": {"rnk": 1}}], "module 'lora': 'rnk'; did you mean 'rank'?"),
    (f"{INIT}.rule", "polcy", "unknown update rule 'polcy'; did you mean 'policy'?"),
    (f"{INIT}.indicators", ["norm_shft"], "unknown indicator 'norm_shft'; did you mean 'norm_shift'?"),
    (f"{INIT}.baselines", ["rigde"], "unknown head 'rigde'; did you mean 'ridge'?"),
    (f"{INIT}.units", [{"module": "film", "kinds": ["nrm"]}], "unknown site kind 'nrm'; did you mean 'norm'?"),
    (f"{INIT}.backbone.name", "resnet81", "unknown backbone 'resnet81'; did you mean 'resnet18'?"),
    ("data.held_out_shifts", ["fogg"], "unknown shift 'fogg' in held_out_shifts; did you mean 'fog'?"),
    ("name", "../elsewhere", "name: '../elsewhere' is not the name of one folder"),
    ("name", "..", "name: '..' is not the name of one folder"),
]  # fmt: skip


@pytest.mark.fault(28)
@pytest.mark.parametrize(("key", "value", "expected"), KEYS, ids=[f"{key}-{value}" for key, value, _ in KEYS])
def test_unknown_names_are_refused(
    key: str, value: Any, expected: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refusal(capsys, "--config", edited(tiny_config, key, value))


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.init_args.sourse", "{}"], f"unknown key {INIT}.sourse; did you mean {INIT}.source?"),
        (["--model.init_args", "{sourse: {}}"], f"unknown key {INIT}.sourse; did you mean {INIT}.source?"),
        (["--model.stps", "2"], f"unknown key {INIT}.stps; did you mean {INIT}.steps?"),
        (["--data", "{rot: {}}"], "unknown key data.rot; did you mean data.root?"),
        (["--data.rot.x={}"], "unknown key data.rot; did you mean data.root?"),
        (["--model.init_args.head", "null"], f"{INIT}.head: expected str, got null"),
        (["--data.shift_share", ".nan"], "data.shift_share: expected a finite number, got nan"),
        (["--data.source_share=1e999"], "source_share=inf must lie above 0"),
        (["--seed_everything", "-1"], "seed_everything must lie in 0..4.29497e+09, got -1"),
    ],
)
def test_options_are_no_less_strict(
    words: list[str], expected: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refusal(capsys, "--config", str(tiny_config), *words)


RANGES: dict[str, list[Any]] = {
    f"{INIT}.learning_rate": [0, -1, math.nan, math.inf, None],
    f"{INIT}.source_images": [0, -1],
    f"{INIT}.source": [None],
    f"{INIT}.source.epochs": [-1, None],
    f"{INIT}.source.learning_rate": [0, -1, math.nan],
    f"{INIT}.source.weight_decay": [-1, math.inf],
    f"{INIT}.source.label_smoothing": [-0.1, 1.1, math.nan],
    f"{INIT}.backbone.seed": [-1, 2**70],
    f"{INIT}.backbone.image_size": [0, -1],
    f"{INIT}.steps": [0, -1, None],
    f"{INIT}.trust": [0, -1, math.inf],
    f"{INIT}.indicator_dropout": [-1, 1],
    f"{INIT}.indicator_noise": [-1, math.nan],
    f"{INIT}.harm_weight": [-1],
    f"{INIT}.harm_margin": [math.nan],
    f"{INIT}.cost_weight": [-1],
    f"{INIT}.budget": [-1, 2],
    f"{INIT}.veto_folds": [-1, 1],
    f"{INIT}.veto_caution": [-1],
    f"{INIT}.veto_trials": [-1],
    f"{INIT}.unlabelled_share": [-1, 2],
    f"{INIT}.calibration_episodes": [0, -1],
    f"{INIT}.head_options": [{"scale": 0}, {"ridge": -1}, {"ridge": math.inf}],
    f"{INIT}.units": [None, []],
    "data.image_size": [0, None],
    "data.ways": [1, [5, 3]],
    "data.shots": [0, [0, 1]],
    "data.eval_shots": [[], [-1]],
    "data.queries": [0, -1, None],
    "data.episodes_per_step": [0],
    "data.steps_per_epoch": [0],
    "data.val_episodes": [0],
    "data.test_episodes": [0],
    "data.batch_size": [0],
    "data.num_workers": [-1],
    "data.seed": [-1],
    "data.shift_share": [-0.1, 1.1, math.nan],
    "data.source_share": [0, 1.1],
    "seed_everything": [-1, 2**32],
}  # fmt: skip


@pytest.mark.parametrize("key", RANGES)
def test_values_out_of_range_are_refused(key: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = key.rpartition(".")[2]
    for value in RANGES[key]:
        if key.startswith("data.") and value is not None:  # the same, without making a learner first
            with pytest.raises(ModmetaError, match=last):
                DomainDataModule(**{last: value})
            continue
        assert last in refusal(capsys, "--config", edited(tiny_config, key, value))


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"module": None}, f"{INIT}.units.module: expected str, got null"),
        ({"gate": 2}, "gate of 'film' must lie in 0..1, got 2"),
        ({"gate": None}, f"{INIT}.units.gate: expected float, got null"),
        ({"rate": 0}, "rate of 'film' must be finite and above 0, got 0"),
        ({"rate": math.inf}, f"{INIT}.units.rate: expected a finite number, got inf"),
        ({"depth": [0.7, 0.1]}, "depth (0.7, 0.1) is not a range"),
        ({"stages": [99]}, "no site matches"),
    ],
)
def test_units_out_of_range_are_refused(
    wrong: dict, expected: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = [{"module": "film", **wrong}]
    assert expected in refusal(capsys, "--config", edited(tiny_config, f"{INIT}.units", units))


OTHERS = [
    ("GradientLearner", {"rate": 0}, "rate must be finite and above 0, got 0"),
    ("GradientLearner", {"steps": -1}, "steps must be finite and above 0, got -1"),
    ("GradientLearner", {"multi_step_epochs": -1, "steps": 2}, "multi_step_epochs must be finite and 0 or more"),
    ("GradientLearner", {"rule": "lslrr"}, "did you mean 'lslr'?"),
    ("GradientLearner", {"execution": "vmpa"}, "unknown execution"),
    ("GradientLearner", {"execution": "vmap", "execution_options": {"chunk": "a"}}, "option 'chunk' of"),
    ("GradientLearner", {"execution": "vmap", "execution_options": {"chnk": 1}}, "did you mean 'chunk'?"),
    ("GradientLearner", {"ways": 1}, "ways is 1; a head tells 2 classes or more apart"),
    ("GradientLearner", {"head": "liner"}, "head: expected one of 'linear', 'zero', 'prototype', got 'liner'"),
    ("ReptileLearner", {"outer_rate": 2}, "outer_rate must lie in 0..1"),
    ("ReptileLearner", {"batch_size": 0}, "batch_size must be 1 or more"),
    ("MetricLearner", {"comparison": "siamse"}, "did you mean 'siamese'?"),
    ("MetricLearner", {"comparison": "siamese", "pair_loss": "logistc"}, "did you mean 'logistic'?"),
    ("MetricLearner", {"comparison_options": {"a": 1}}, "comparison_options are given, but no comparison"),
    ("MemoryLearner", {"network": "lsmt", "ways": 4}, "did you mean 'lstm'?"),
    ("MemoryLearner", {"network": "mann", "ways": 4, "network_options": {"decay": 2}}, "decay must lie in 0..1, got 2"),
    ("MemoryLearner", {"network": "lstm", "ways": 0}, "label codes for 2 or more classes, got 0"),
    ("AmortizedLearner", {"hidden": 0, "units": [{"module": "film"}]}, "hidden must be 1 or more, got 0"),
    ("SourceLearner", {"source": {"epochs": -1}}, "source.epochs must be finite and 0 or more, got -1"),
]


@pytest.mark.parametrize(("learner", "arguments", "expected"), OTHERS, ids=[f"{n}-{a}" for n, a, _ in OTHERS])
def test_every_learner_refuses(
    learner: str, arguments: dict, expected: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = {"name": "test_efficientnet", "pretrained": False, "image_size": 32}
    model = {"class_path": learner, "init_args": {"backbone": backbone, **arguments}}
    assert expected in refusal(capsys, "--config", edited(tiny_config, "model", model))


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data:\n  ways: 4\ndata:\n  ways: 3\n", "line 3 is no valid YAML: the key data is given twice, here and in "),
        (b"data:\n  ways: 4\n  'ways': 3\n", "the key ways is given twice, here and in line 2"),
        (b"data:\n\tways: 4\n", "line 2 is no valid YAML: found character '\\t'"),
        (b"name: \xe9\n", "cannot be read ('utf-8' codec can't decode byte 0xe9"),
        ("name: x".encode("utf-16"), "cannot be read ('utf-8' codec"),
        (b"name: \0\n", "is no valid YAML: unacceptable character"),
        (b"name: a\n---\nname: b\n", "is no valid YAML: but found another document"),
        (b"1: 2\n", "unknown key 1; known: "),
    ],
)  # fmt: skip
def test_broken_files_are_refused(content: bytes, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.yaml").write_bytes(content)
    assert expected in refusal(capsys, "--config", "broken.yaml")


@pytest.mark.fault(27)
@pytest.mark.parametrize("place", ["file", "option", "units of `modules`", "a name that is put together"])
def test_a_configuration_reads_no_environment(
    place: str, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", "leaked")
    value = "${oc.${data.root}:SECRET}" if place.startswith("a name") else "${oc.env:SECRET}"
    words = ["fit", "--config", str(tiny_config), "--name", value]
    if place != "option":
        key = f"{INIT}.backbone.name" if "units" in place else "name"
        content = edited(tiny_config, key, value)
        if place.startswith("a name"):
            content = edited(Path(content), "data.root", "env")
        words = ["modules", "--units", content] if "units" in place else ["fit", "--config", content]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert "a configuration may not read the environment (oc.env)" in captured.err
    assert "leaked" not in captured.out + captured.err
    assert not Path("runs").exists()


@pytest.mark.fault(27)
def test_yaml_makes_no_objects(capsys: pytest.CaptureFixture[str]) -> None:
    Path("object.yaml").write_text("name: !!python/object/apply:os.mkdir [canary]\n")
    assert "could not determine a constructor" in refusal(capsys, "--config", "object.yaml")
    assert not Path("canary").exists()


@pytest.mark.fault(28)
def test_unknown_domains_of_a_folder_are_refused_before_its_images_are_decoded(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DomainDataModule, "_open_store", OPEN_STORE)
    monkeypatch.setattr("modmeta.data.folders.inspect_files", lambda *_: pytest.fail("images were decoded"))
    for domain in ("photo", "neon", "slanted"):
        Path("images", domain, "cat").mkdir(parents=True)
    content = Path(edited(tiny_config, "data.root", str(Path("images").absolute())))
    line = refusal(capsys, "--config", edited(content, "data.test_domains", ["neom"]))
    assert "unknown domain 'neom' in test_domains; did you mean 'neon'?" in line


@pytest.mark.fault(21)
def test_a_run_folder_that_cannot_be_made_is_told_before_any_work(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs").write_text("a file")
    assert "runs is a file); work in another one" in refusal(capsys, "--config", str(tiny_config))


def keys(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(content, dict):
            yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from keys(value, (*path, key))


def one_edit_apart(a: str, b: str) -> bool:
    if len(a) > len(b):
        a, b = b, a
    place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    return a != b and (a[place:] == b[place + 1 :] or (len(a) == len(b) and a[place + 1 :] == b[place + 1 :]))


EXAMPLE = yaml.safe_load(QUICKSTART.read_text())
LETTERS = st.sampled_from("abcdefghijklmnopqrstuvwxyz_0123456789")


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(keys(EXAMPLE), key=str)), st.data())
def test_a_wrong_letter_in_any_key_is_found(path: tuple[Any, ...], data: st.DataObject) -> None:
    name = path[-1]
    place = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(LETTERS)
    before, rest = name[:place], name[place:]
    wrong = data.draw(st.sampled_from([before + rest[1:], before + letter + rest[1:], before + letter + rest]))
    content = yaml.safe_load(QUICKSTART.read_text())
    inner = content
    for part in path[:-1]:
        inner = inner[part]
    assume(wrong and wrong not in inner and isinstance(yaml.safe_load(wrong), str))
    inner[wrong] = inner.pop(name)
    Path("mutated.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ModmetaError) as caught:
        CommandLine(Arguments.parse(["--config", "mutated.yaml"]))
    full = ".".join(part for part in path[:-1] if isinstance(part, str))
    found = str(caught.value)
    assert "\n" not in found
    assert found.startswith(f"unknown key {full + '.' if full else ''}{wrong}; did you mean ")
    meant = found.removesuffix("?").rpartition(".")[2].rpartition(" ")[2]
    assert one_edit_apart(meant, wrong)
