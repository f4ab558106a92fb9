"""Who may import whom, and what must not wait for torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import modmeta

ROOT = Path(modmeta.__file__).parent
FREE = {"errors", "registry", "files"}  # anyone may import these

# The design's table: what each part of the package may import besides itself and what is free.
ALLOWED = {
    "errors": set(),
    "registry": set(),
    "files": set(),
    "allocator": set(),
    "__init__": set(),
    "backbone": set(),
    "adapters": {"backbone"},
    "adaptation": {"adapters", "backbone"},
    "data": set(),
    "learners": {"adaptation", "adapters", "backbone", "data"},
    "evaluation": {"learners", "adaptation", "adapters", "backbone", "data"},
    "search": {"learners", "adaptation", "adapters", "backbone", "data"},
    "monitoring": {"adaptation", "adapters", "backbone", "data"},
    "serving": {"adaptation", "adapters", "backbone", "__init__"},  # a host answers with the adapters' heads
    "commands": {
        "cli",
        "evaluation",
        "search",
        "serving",
        "learners",
        "adaptation",
        "adapters",
        "backbone",
        "data",
        "__init__",
    },
    "cli": {"commands", "allocator", "__init__"},
    "__main__": {"cli"},
}
HEAVY = {"torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "sklearn", "matplotlib"}
LIGHT = {"__init__", "__main__", "cli", "errors", "registry", "files", "allocator", "evaluation/terminal"}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            if node.module == "modmeta":  # public names lead everywhere; the version and the parts are what they say
                yield from (f"modmeta.{alias.name}" for alias in node.names if alias.name != "__version__")
            else:
                yield node.module


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """Yield what is imported when a module itself is, functions and type checking left out."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(node)


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_upward(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} has no place in the table of layers"
    for name in imported(ast.parse(path.read_text())):
        package, _, rest = name.partition(".")
        assert package != "modmeta_modules", "nothing imports the modules; they plug in"
        if package != "modmeta":
            continue
        other = rest.partition(".")[0] or "__init__"
        allowed = ALLOWED[part] | FREE | {part}
        assert other in allowed, f"{part} must not import {name}"


def test_modules_import_only_the_contract() -> None:
    import modmeta_modules

    for path in Path(modmeta_modules.__file__).parent.glob("*.py"):
        names = [name for name in imported(ast.parse(path.read_text())) if name.startswith("modmeta")]
        assert set(names) <= {"modmeta.adapters", "modmeta.backbone", "modmeta.errors"}, path.name


def test_a_module_of_the_package_is_one_short_file() -> None:
    import modmeta_modules

    for path in Path(modmeta_modules.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        assert len(classes) == (0 if path.name == "__init__.py" else 1), path.name


def test_the_light_files_import_nothing_heavy() -> None:
    for path in FILES:
        if path.relative_to(ROOT).with_suffix("").as_posix() not in LIGHT:
            continue
        names = {name.partition(".")[0] for name in at_import_time(ast.parse(path.read_text()))}
        assert not names & HEAVY, path.name


def test_importing_the_package_leaves_torch_alone() -> None:
    light = ["modmeta", "modmeta.errors", "modmeta.registry", "modmeta.files", "modmeta.cli"]
    script = (
        "import importlib, sys\n"
        f"for name in {light!r}: importlib.import_module(name)\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_public_names_load_when_they_are_used() -> None:
    for name in modmeta._HOMES:
        assert name in dir(modmeta)
        assert getattr(modmeta, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Backbon'"):
        modmeta.Backbon  # noqa: B018
