"""The front door: fast, without torch, and clear about what it does not know."""

import subprocess
import sys

import pytest

from modmeta import __version__
from modmeta.cli import COMMANDS, main
from modmeta.errors import ModmetaError

LIGHT = (
    ["--help"], ["--version"], [], ["fitt"], ["fit", "--help"], ["test", "-h"], ["adapt", "--help"],
    ["predict", "--bad"], ["modules"], ["export", "--help"], ["compare", "--help"],
)  # fmt: skip


def test_light_commands_do_not_import_torch() -> None:
    script = (
        "import sys\n"
        "from modmeta.cli import main\n"
        f"codes = [main(words) for words in {LIGHT!r}]\n"
        "heavy = {'torch', 'lightning', 'timm', 'jsonargparse', 'omegaconf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert codes == [0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0], codes\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_python_dash_m_is_the_same_front_door() -> None:
    done = subprocess.run([sys.executable, "-m", "modmeta", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"modmeta {__version__}\n")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fitt"], "unknown command 'fitt'; did you mean 'fit'?"),
        (["adpat"], "unknown command 'adpat'; did you mean 'adapt'?"),
        (
            ["adapt", "--checkpoint", "a", "--suport", "b", "--support", "b", "--output", "c"],
            "did you mean --support?",
        ),
        (["predict"], "--checkpoint, --adapter, --images, --output"),
        (["modules", "--image-size", "x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("modmeta: error: ")
    assert expected in lines[0]


def test_a_user_error_is_found_behind_other_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        try:
            raise ModmetaError("the cause\nof it all")
        except ModmetaError as error:
            raise RuntimeError("wrapped") from error

    monkeypatch.setattr("modmeta.cli._dispatch", fail)
    assert main(["fit"]) == 2
    assert capsys.readouterr().err == "modmeta: error: the cause of it all\n"


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    def exit_as_lightning_does(arguments: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    for way in (interrupt, exit_as_lightning_does):
        monkeypatch.setattr("modmeta.cli._dispatch", way)
        assert main(["fit"]) == 130


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("modmeta.cli._dispatch", fail)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])
