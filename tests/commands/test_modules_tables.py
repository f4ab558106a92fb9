"""modules: what is registered, and what it does on a backbone."""

from pathlib import Path

import pytest

from modmeta.adapters import MODULES
from modmeta.backbone import Backbone
from modmeta.cli import main
from modmeta.commands.modules import installed


def test_the_list_read_from_source_agrees_with_the_classes() -> None:
    found = {entry.name: entry for entry in installed()}
    assert {"bottleneck", "film", "lora", "norm_blend", "projection", "prompt"} <= set(found)
    for name, entry in found.items():
        cls = MODULES.get(name)
        assert entry.kinds == ", ".join(sorted(cls.kinds))
        assert entry.summary == (cls.__doc__ or "").splitlines()[0]


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


def test_a_module_without_defaults_is_listed_with_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(
        "from modmeta.adapters import AdapterModule, register_module\n\n\n"
        '@register_module("test_sized")\n'
        "class Sized(AdapterModule):\n"
        '    kinds = frozenset({"norm"})\n\n'
        "    def __init__(self, site, size):\n"
        "        super().__init__(site)\n"
    )
    assert main(["modules", "--modules", "mine.py", "--backbone", "test_vit", "--image-size", "32"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "test_sized" in line)
    assert all(word in row for word in ("13", "needs size"))


def test_the_units_of_a_configuration(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["modules", "--units", str(tiny_config)]) == 0
    shown = capsys.readouterr().out
    assert "test_efficientnet with random weights, 32 pixels" in shown
    assert "film@all" in shown
    Path("units.yaml").write_text("- {module: lora, group: block}\n")
    assert main(["modules", "--units", "units.yaml", "--backbone", "test_vit"]) == 0
    assert "lora@b" in capsys.readouterr().out


def test_what_every_site_of_a_unit_costs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("units.yaml").write_text(
        "- {module: prompt, options: {length: 2}, names: ['blocks.[45]']}\n"
        "- {module: lora, options: {rank: 1}, names: [blocks.5.mlp.fc2]}\n"
        "- {module: projection, options: {rank: 1}}\n"
    )
    assert main(["modules", "--units", "units.yaml", "--backbone", "test_vit", "--image-size", "32"]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:] for row in rows if row}
    depth = {site.name: f"{site.depth:.2f}" for site in Backbone("test_vit", False, 32).sites}
    # 4 patches and a class token of width 64, 7 tokens with the prompt; a layer's weights are applied to each.
    block = 64 * (3 * 64) + 64 * 64 + 2 * 64 * 192
    again, last, both = f"{7 * block:,}", f"{(5 + 7) * block:,}", f"{2 * (5 + 7) * block:,}"
    assert found["blocks.4"] == ["block", depth["blocks.4"], "5x64", "129", again, f"{(5 + 5 + 7) * block:,}"]
    assert found["blocks.5"] == ["block", depth["blocks.5"], "5x64", "129", again, last]
    assert found["prompt@s0"] == ["block", depth["blocks.4"], "2 sites", "258", f"{2 * 7 * block:,}", both]
    assert found["blocks.5.mlp.fc2"] == ["mlp", depth["blocks.5.mlp.fc2"], "64x192", "256", "0", f"{5 * block:,}"]
    assert found["features"] == ["features", "1.00", "1x64", "128", "128", "128"]


def test_reading_units_need_no_backward_pass(capsys: pytest.CaptureFixture[str]) -> None:
    Path("units.yaml").write_text("- {module: norm_blend, group: all}\n")
    assert main(["modules", "--units", "units.yaml", "--backbone", "test_resnet", "--image-size", "32"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "norm_blend@all" in line)
    assert [cell.strip() for cell in row.split("│")][-3:-1] == ["0", "0"]


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
        (
            "- {module: film, kinds: [norm], stages: [7]}",
            ["--backbone", "test_vit"],
            "no site matches {'kinds': ('norm',), 'stages': (7,), 'depth': (0.0, 1.0)}; there are kinds norm (13)",
        ),
        (
            "- {module: prompt, options: {length: -1}}",
            ["--backbone", "test_vit"],
            "prompt: length must be 1 or more, got -1",
        ),
        ("- {module: film}", ["--backbone", "test_vitt"], "did you mean 'test_vit'?"),
    ],
)
def test_wrong_units(content: str, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("units.yaml").write_text(content)
    assert main(["modules", "--units", "units.yaml", *words]) == 2
    assert expected in capsys.readouterr().err
