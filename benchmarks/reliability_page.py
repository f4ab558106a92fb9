"""Writes the table of faults, and which tests show them, into docs/reliability.md.

    python benchmarks/reliability_page.py [runs/benchmark-crashes]

The tests are found by their mark ``@pytest.mark.fault(ROW, ...)``. With the folder that ``crashes.py`` was given as
``--out``, its table is brought into the page, too; otherwise that part stays as it is.
"""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matrix.tables import between, markdown

from modmeta.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
NO_MONITOR = "concerns the monitoring of drift, which is not part of this release"


class Fault(NamedTuple):
    """A row of the table: what goes wrong, and what modmeta does; ``here`` is false for what it has no part for."""

    what: str
    does: str
    here: bool = True


FAULTS = {
    1: Fault(
        "a truncated image in a folder",
        "left out, with file name and reason in a warning and in every report; no other image takes its place. "
        "`data.strict_images` makes it an error",
    ),
    2: Fault(
        "damage inside a JPEG that still decodes",
        "no decoder notices it; the hashes of bytes and pixels in the manifest of `check` differ from those before",
    ),
    3: Fault("an empty file, text named `.jpg`, a folder named `x.jpg`", "left out, each with a reason of its own"),
    4: Fault(
        "16-bit and floating-point images",
        "16 bits are scaled, not cut off; floating-point pixels are refused where no range is known",
    ),
    5: Fault("EXIF orientation", "turned upright: the same pixels, to the bit, as the file that was turned before"),
    6: Fault(
        "CMYK, palettes, transparency, several frames",
        "one rule and a note for each: colours become RGB, transparency is laid on white so that what hides under it "
        "is never seen, and the first frame is taken",
    ),
    7: Fault(
        "a decompression bomb",
        "refused by the size in its header, before a pixel is decoded; large files are refused unread",
    ),
    8: Fault("images of a few pixels", "a side under 8 pixels is refused; very long ones are decoded in small memory"),
    9: Fault(
        "loops of links, links out of the folder or to nowhere, FIFOs, unreadable files, names that are not UTF-8",
        "every file is listed once, or passed over with a reason; nothing but regular files is opened; the scan ends",
    ),
    10: Fault("a class folder without images", "an error that names it; no class number shifts"),
    11: Fault(
        "one image of each class",
        "adapts; nothing can be held out, so the policy's forecast decides, and the card says that the veto had no "
        "evidence",
    ),
    12: Fault(
        "a class without support images",
        "`adapt` names the empty folder; heads stay finite, and an anchored one starts from what the sources know "
        "of the class",
    ),
    13: Fault(
        "a query of a class that the support has not",
        "`predict` answers with classes of the support only; in a measurement it is an error with label and episode",
    ),
    14: Fault("another order of the classes in folder, adapter or checkpoint", "classes are matched by name"),
    15: Fault(
        "the same image under two labels, or in support and query",
        "contradicting copies are left out and told; other copies are used once, so that none is on both sides",
    ),
    16: Fault("wrong labels", "ranked by doubt for a person to look at; see [check.md](check.md#suspicious-labels)"),
    17: Fault(
        "NaN or infinity in a loss, gradient, figure or file",
        "stops with step, domain, episode and unit; nothing that is not finite is written",
    ),
    18: Fault("NaN or infinity in the images that a monitor watches", NO_MONITOR, here=False),
    19: Fault(
        "kill -9 while something is written",
        "the old file or the new one is there, whole; `--resume auto` takes the newest sound checkpoint and names what "
        "it skips; what the killed process left is swept later",
    ),
    20: Fault("a full disk", "what was there stays; one line says how much room was needed, and where"),
    21: Fault(
        "an output that exists, is a file or cannot be written to", "refused before any work; `--overwrite` replaces"
    ),
    22: Fault(
        "SIGTERM",
        "the step is finished, a checkpoint written, exit code 143; the resumed run ends like one that was not "
        "stopped, to the bit. A second signal ends at once",
    ),
    23: Fault("SIGINT (Ctrl-C)", "the same, exit code 130"),
    24: Fault(
        "resuming with another configuration, data or backbone", "refused, with what changed; devices may, with a note"
    ),
    25: Fault(
        "an adapter for another backbone, other weights or another image size",
        "refused, with what was expected and what was found; the fingerprint covers weights and preprocessing",
    ),
    26: Fault(
        "a damaged or forged adapter file, checkpoint or cache", "refused in one line; no changed byte gets through"
    ),
    27: Fault(
        "pickled code, configurations that read the environment",
        "never run and never read: files are data, and are refused otherwise",
    ),
    28: Fault(
        "a mistyped key, a wrong type, a number out of range, an unknown name",
        "refused before data is read, with the nearest right name",
    ),
    29: Fault(
        "other shapes: image size, classes, rank", "one line with the tensor or unit, what was expected and found"
    ),
    30: Fault(
        "one of several processes dies",
        "the others end with an error, the last checkpoint is sound, and the run can be resumed from it",
    ),
    31: Fault("adapters exchanged while threads predict", "every answer is wholly that of the version it names"),
    32: Fault("an exchange for an invalid adapter", "an error for whoever asked; the one before goes on answering"),
    33: Fault(
        "the same seed again, other numbers of workers, resumed anywhere, two processes",
        "equal weights, optimiser states and logged figures, to the bit, on CPU",
    ),
    34: Fault("adapting, replacing and removing another domain", "no logit of this domain changes by a bit"),
    35: Fault("`train()` called on a frozen backbone", "it stays in evaluation mode, whatever its normalisation"),
    36: Fault("a damaged, old or contended state of a monitor", NO_MONITOR, here=False),
    37: Fault(
        "figures of nothing: no episodes, no gap, one confidence, no finite logits",
        "left out where there is nothing to measure, an error with its place where something is not finite; never a "
        "number in its stead. The interval of a single episode has no width, and the count of 1 stands beside it",
    ),
    38: Fault("a comparison that is killed and started again", "ends with the rows of one that was not, but for times"),
    39: Fault(
        "missing or damaged pretrained weights, no network",
        "one line at once, with where to put a file; random weights only where they were asked for",
    ),
    40: Fault(
        "out of memory",
        "the episodes of a step are taken in halves, with the same result; otherwise one line with advice",
    ),
    41: Fault("hostile names of files and classes", "escaped in pages, refused with control characters, never a path"),
    42: Fault("no GPU, no network, a read-only home, another locale, odd paths", "works"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crashes", nargs="?", type=Path, help="the folder that crashes.py wrote to")
    options = parser.parse_args()
    page = between(PAGE.read_text(encoding="utf-8"), "faults", table())
    if options.crashes is not None:
        page = between(page, "crashes", (options.crashes / "table.md").read_text(encoding="utf-8"))
    write_atomically(PAGE, page.encode())


def table() -> str:
    """Return the table: row, fault, what modmeta does, and the tests that show it, by file."""
    found = tests()
    rows = [[str(row), fault.what, fault.does, _links(found.get(row, []))] for row, fault in FAULTS.items()]
    return markdown(["row", "fault", "what modmeta does", "shown by"], rows)


def tests() -> dict[int, list[tuple[Path, str]]]:
    """Return for each row the tests that are marked with it, as (file, name)."""
    found: dict[int, list[tuple[Path, str]]] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if "mark.fault" not in text:
            continue
        tree = ast.parse(text)
        # Marks may stand in a list of parameters that has a name.
        named = {
            target.id: set(_rows(node.value))
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                own = (_marked(each, named) for each in node.decorator_list)
                for row in sorted(named.get("pytestmark", set()).union(*own)):
                    found.setdefault(row, []).append((file, node.name))
    return found


def _marked(decorator: ast.expr, named: dict[str, set[int]]) -> set[int]:
    names = {node.id for node in ast.walk(decorator) if isinstance(node, ast.Name)}
    return set(_rows(decorator)).union(*(named[name] for name in names & named.keys()))


def _rows(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
            yield from (ast.literal_eval(each) for each in node.args)


def _links(found: list[tuple[Path, str]]) -> str:
    by_file: dict[Path, list[str]] = {}
    for file, name in found:
        by_file.setdefault(file, []).append(f"`{name}`")
    paths = {file: os.path.relpath(file, PAGE.parent) for file in by_file}
    return "<br>".join(f"[{file.name}]({paths[file]}): {', '.join(names)}" for file, names in by_file.items())


if __name__ == "__main__":
    main()
