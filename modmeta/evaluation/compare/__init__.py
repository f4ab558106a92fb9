"""Any number of systems on the same frozen episodes, with paired differences."""

from modmeta.evaluation.compare.manifest import Manifest, Place, draw_manifest, read_manifest
from modmeta.evaluation.compare.report import write_report
from modmeta.evaluation.compare.rows import Row, RowFile
from modmeta.evaluation.compare.runner import run_comparison
from modmeta.evaluation.compare.settings import Comparison

__all__ = [
    "Comparison",
    "Manifest",
    "Place",
    "Row",
    "RowFile",
    "draw_manifest",
    "read_manifest",
    "run_comparison",
    "write_report",
]
