"""modules: what is registered, and what it does on a backbone."""

from pathlib import Path

import pytest

from modmeta.adapters import MODULES
from modmeta.cli import main
from modmeta.commands.modules import installed


def test_the_list_read_from_source_agrees_with_the_classes() -> None:
    found = {entry.name: entry for entry in installed()}
    assert {"film", "lora", "norm_blend", "projection"} <= set(found)
    for name in ("film", "lora", "norm_blend", "projection"):
        cls = MODULES.get(name)
        assert found[name].kinds == ", ".join(sorted(cls.kinds))
        assert found[name].summary == (cls.__doc__ or "").splitlines()[0]


def test_modules_of_a_users_file_are_listed_without_importing_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(
        "raise SystemExit\n"
        '@register_module("mine")\n'
        "class Mine(AdapterModule):\n"
        '    """Does my thing."""\n\n'
        '    kinds = frozenset({"norm", "mlp"})\n'
    )
    assert main(["modules", "--modules", "mine.py"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "mine.py" in line)
    assert all(word in row for word in ("mine", "mlp, norm", "Does my thing."))


def test_sites_and_costs_on_a_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["modules", "--backbone", "test_vit", "--image-size", "64"]) == 0
    shown = capsys.readouterr().out
    assert "random weights, 64 pixels" in shown
    assert "qkv" in shown
    row = next(line for line in shown.splitlines() if "norm_blend" in line)
    assert " 0 " in row


def test_the_units_of_a_configuration(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["modules", "--units", str(tiny_config)]) == 0
    shown = capsys.readouterr().out
    assert "test_efficientnet with random weights, 32 pixels" in shown
    assert "film@all" in shown
    Path("units.yaml").write_text("- {module: lora, group: block}\n")
    assert main(["modules", "--units", "units.yaml", "--backbone", "test_vit"]) == 0
    assert "lora@b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words", "expected"),
    [
        (
            "- {module: flim}",
            ["--backbone", "test_vit"],
            "unknown adapter module 'flim'; did you mean 'film'?",
        ),
        (
            "- {module: film, grup: all}",
            ["--backbone", "test_vit"],
            "'grup' in units.yaml; did you mean 'group'?",
        ),
        ("hello", ["--backbone", "test_vit"], "expected a fit configuration, or a list of units"),
        ("- {module: film}", [], "names no backbone; add --backbone NAME"),
        ("- {module: film}", ["--backbone", "test_vitt"], "did you mean 'test_vit'?"),
    ],
)
def test_wrong_units(content: str, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("units.yaml").write_text(content)
    assert main(["modules", "--units", "units.yaml", *words]) == 2
    assert expected in capsys.readouterr().err
