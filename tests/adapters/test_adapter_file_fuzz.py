"""Mutated adapter files: each is refused in one line, or loads as exactly what it says."""

from pathlib import Path

import pytest
from adapter_files import MUTATIONS, fuzz, original

COUNT = 10 * len(MUTATIONS)
SIGNED_TEXTS = {"unicode_text", "interpolation"}


@pytest.mark.fault(26, 27)
def test_no_mutated_file_loads_wrongly_crashes_or_runs_code(tmp_path: Path) -> None:
    model, path = original(tmp_path, "test_efficientnet", 32, seed=0)
    tallies = fuzz(tmp_path, model, path, COUNT, seed=1)
    assert not (tmp_path / "code-was-run").exists()
    assert sum(tally.count for tally in tallies.values()) == COUNT
    faults = {kind: tally.example for kind, tally in tallies.items() if tally.wrong or tally.crashed}
    assert not faults
    # Neither a reader that takes everything nor one that takes nothing would pass.
    assert all(tally.harmless == tally.count for kind, tally in tallies.items() if kind in SIGNED_TEXTS)
    kept_apart = SIGNED_TEXTS | {"other_json", "renamed_tensor", "offsets"}  # these may change nothing
    assert all(tally.refused == tally.count for kind, tally in tallies.items() if kind not in kept_apart)
