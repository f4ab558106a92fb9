"""The page of the faults says what the tests' marks say, and every row is shown by a test."""

import pytest
import reliability_page
from matrix.tables import between

PAGE = reliability_page.PAGE.read_text(encoding="utf-8")


def test_the_page_is_what_the_script_would_write() -> None:
    now = between(PAGE, "faults", reliability_page.table())
    assert now == PAGE, "the marks have changed; run python benchmarks/reliability_page.py"


def test_every_row_is_shown_by_a_test_unless_there_is_no_such_part() -> None:
    shown = reliability_page.tests()
    assert {row for row, fault in reliability_page.FAULTS.items() if fault.here} == shown.keys()


def test_marks_are_found_wherever_pytest_finds_them(request: pytest.FixtureRequest) -> None:
    """What this session collected is the oracle, which is the more the more tests run."""
    known = {(file, name) for found in reliability_page.tests().values() for file, name in found}
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    marked = {(item.path, item.originalname) for item in items if item.get_closest_marker("fault")}
    assert marked <= known
    # Whoever chooses by mark or name may leave out just the parameters that are marked.
    if not request.config.option.markexpr and not request.config.option.keyword:
        assert known & {(item.path, item.originalname) for item in items} == marked


def test_the_page_names_the_command_and_the_count_of_the_crashes() -> None:
    crashes = PAGE.split("\n## Crashes\n")[1]
    assert "python benchmarks/crashes.py --crashes 500" in crashes
    assert "500 crashes of modmeta's writers in" in crashes
    assert ", 0 with a loss" in crashes
