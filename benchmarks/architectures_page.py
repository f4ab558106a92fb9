"""Writes the results of architectures.py, families.py and peft_matrix.py into docs/architectures.md.

    python benchmarks/architectures_page.py runs/architectures runs/families runs/peft

Tables of benchmarks that are not given stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matrix.tables import between

from modmeta.files import write_atomically

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="what the benchmarks were given as --output")
    page = PAGE.read_text(encoding="utf-8")
    for folder in parser.parse_args().folders:
        for table in sorted(folder.glob("*.md")):
            page = between(page, table.stem, table.read_text(encoding="utf-8"))
    write_atomically(PAGE, page.encode())


if __name__ == "__main__":
    main()
