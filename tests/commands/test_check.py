"""check: the right verdict for every kind of file, whole reports only, and exit codes that scripts can trust."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_zoo import SCRIPT, clean, picture, zoo
from PIL import Image

from modmeta.cli import main

FILES = {"manifest.jsonl", "check.json", "check.html"}


@dataclass(frozen=True)
class Checked:
    root: Path
    code: int
    lines: dict[str, dict[str, Any]]
    summary: dict[str, Any]
    page: str

    def cases(self, kind: str) -> str:
        return "\n".join(next(each["cases"] for each in self.summary["findings"] if each["kind"] == kind))


def read(output: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    return {line["path"]: line for line in lines}, json.loads((output / "check.json").read_text())


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "elsewhere").mkdir()
    root = zoo(folder / "zoo", folder / "elsewhere")
    with chdir(folder):
        code = main(["check", "zoo"])
    lines, summary = read(folder / "check-zoo")
    return Checked(root, code, lines, summary, (folder / "check-zoo" / "check.html").read_text())


CASES = [
    ("truncated.jpg", "quarantined", "truncated"),
    ("garbage.jpg", "ok", ""),
    ("zero.jpg", "quarantined", "empty"),
    ("text.jpg", "quarantined", "no image of a known format"),
    ("folder.jpg", "skipped", "is a folder"),
    ("deep.png", "ok", "16-bit"),
    ("float.tiff", "quarantined", "range is unknown"),
    ("rotated.jpg", "ok", "orientation 6"),
    ("cmyk.jpg", "ok", "CMYK"),
    ("palette.png", "ok", "transparency"),
    ("animated.gif", "ok", "first of"),
    ("bomb.png", "quarantined", "10200 x 10200 pixels"),
    ("dot.png", "quarantined", "1 x 1 pixels"),
    ("line.png", "quarantined", "4000 x 2 pixels"),
    ("outside.png", "skipped", "leads out of the data folder"),
    ("dangling.png", "skipped", "leads nowhere"),
    ("pipe.png", "skipped", "not a regular file"),
    ("\\udcff.png", "skipped", "not UTF-8"),
    ("line\\nbreak.png", "skipped", "control characters"),
]


@pytest.mark.fault(1, 2, 3, 4, 5, 6, 7, 8, 9)
@pytest.mark.parametrize(("name", "verdict", "why"), CASES)
def test_the_verdict(name: str, verdict: str, why: str, checked: Checked) -> None:
    line = checked.lines[f"photo/cat/{name}"]
    assert line["verdict"] == verdict
    assert why in " ".join([line["reason"] or "", *line.get("notes", [])])
    shown = {"quarantined": "quarantined", "skipped": "skipped"}.get(verdict)
    if shown is not None:
        assert f"photo/cat/{name} " in checked.cases(shown)


@pytest.mark.fault(2)
def test_damage_that_no_decoder_sees_shows_in_the_hashes(checked: Checked) -> None:
    whole, damaged = (checked.lines[f"photo/cat/{name}.jpg"] for name in ("whole", "garbage"))
    for line in (whole, damaged):
        assert line["sha256"] == hashlib.sha256((checked.root / line["path"]).read_bytes()).hexdigest()
    assert whole["sha256"] != damaged["sha256"]
    assert whole["pixels_sha256"] != damaged["pixels_sha256"]


@pytest.mark.fault(9)
def test_a_loop_of_links_lists_every_file_once(checked: Checked) -> None:
    files = [path for path in checked.root.rglob("*") if path.is_file() and not path.is_symlink()]
    listed = [line for line in checked.lines.values() if line["verdict"] != "skipped"]
    assert len(listed) == checked.summary["files"] == len(files) - 2  # less the two with unusable names
    assert "photo/dog/loop" in checked.cases("skipped")


@pytest.mark.fault(10)
def test_an_empty_class_is_an_error_that_names_it(checked: Checked) -> None:
    assert checked.code == 2
    assert re.search(r"photo/empty holds no image", checked.cases("folders"))
    assert ".hidden" not in json.dumps(checked.summary)


@pytest.mark.fault(15)
def test_duplicates_and_contradicting_labels(checked: Checked) -> None:
    assert checked.cases("conflicting_labels") == "photo/cat/both.png = photo/dog/both.bmp"
    assert checked.cases("copies") == "photo/cat/1.png = photo/cat/again.png"
    assert checked.cases("near_conflicts") == "photo/cat/near.png = photo/dog/near.jpg"
    assert checked.lines["photo/cat/again.png"]["copy_of"] == "photo/cat/1.png"
    assert checked.lines["photo/dog/near.jpg"]["near_copy_of"] == "photo/cat/near.png"
    assert checked.lines["photo/cat/1.png"]["copy_of"] is None


def test_the_counts_agree_with_the_manifest(checked: Checked) -> None:
    good = [line for line in checked.lines.values() if line["verdict"] == "ok"]
    assert checked.summary["good"] == len(good)
    assert checked.summary["files"] == checked.summary["good"] + checked.summary["quarantined"]
    for domain, numbers in checked.summary["domains"].items():
        for name, count in numbers["classes"].items():
            assert count == sum((line["domain"], line["class"]) == (domain, name) for line in good)


class Reader(HTMLParser):
    """Collects the tags of a page and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]


@pytest.mark.fault(41)
def test_the_page_is_self_contained_and_escapes_names(checked: Checked) -> None:
    assert SCRIPT in checked.summary["domains"]["photo"]["classes"]
    reader = Reader()
    reader.feed(checked.page)
    assert not reader.tags & {"script", "link", "iframe", "object", "form"}
    assert reader.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in reader.sources)
    assert "&lt;script&gt;alert(1)&lt;&amp;script&gt;" in checked.page
    assert "http://" not in checked.page
    assert "https://" not in checked.page


def test_no_metadata_of_an_image_is_written(checked: Checked) -> None:
    assert b"a secret of mine" in (checked.root / "photo/cat/rotated.jpg").read_bytes()
    output = checked.root.parent / "check-zoo"
    for name in FILES:
        assert b"secret" not in (output / name).read_bytes()


def test_a_clean_folder(capsys: pytest.CaptureFixture[str]) -> None:
    clean(Path("pictures"))
    assert main(["check", "pictures"]) == 0
    shown = capsys.readouterr().out
    assert "12 image files (domain/class/image): 12 good, 0 quarantined" in shown
    assert "0 kinds of errors, 0 kinds of warnings" in shown
    assert {path.name for path in Path("check-pictures").iterdir()} == FILES
    lines, summary = read(Path("check-pictures"))
    assert summary["clean"]
    assert summary["manifest_sha256"] == hashlib.sha256(Path("check-pictures/manifest.jsonl").read_bytes()).hexdigest()
    assert [*lines] == sorted(lines)


def test_a_single_domain(capsys: pytest.CaptureFixture[str]) -> None:
    clean(Path("pictures"))
    assert main(["check", "pictures/photo", "--output", "out"]) == 0
    assert "6 image files (one domain, class/image)" in capsys.readouterr().out
    lines, summary = read(Path("out"))
    assert summary["layout"] == "class/image"
    assert {line["domain"] for line in lines.values()} == {"photo"}
    assert {line["class"] for line in lines.values()} == {"cat", "dog"}


def test_the_same_folder_gives_the_same_bytes() -> None:
    clean(Path("pictures"))
    for output, workers in (("one", "1"), ("two", "3")):
        assert main(["check", "pictures", "--output", output, "--workers", workers]) == 0
    for name in FILES:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def stripes(upright: bool, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    wave = np.sin(np.arange(64) * random.uniform(0.4, 0.6) + random.uniform(0, 6))
    pixels = 128 + 80 * np.tile(wave, (64, 1)) + random.normal(0, 10, (64, 64))
    return Image.fromarray((pixels if upright else pixels.T).clip(0, 255).astype(np.uint8))


@pytest.fixture
def striped() -> Path:
    root = Path("stripes")
    for upright, name in ((True, "upright"), (False, "level")):
        (root / "paper" / name).mkdir(parents=True)
        for seed in range(12):
            stripes(upright, seed).save(root / "paper" / name / f"{seed:02}.png")
    stripes(True, 50).save(root / "paper" / "level" / "50.png")
    return root


@pytest.mark.fault(16)
@pytest.mark.parametrize("words", [[], ["--backbone", "test_efficientnet", "--image-size", "64"]])
def test_a_wrong_label_is_the_most_suspicious(words: list[str], striped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if words:  # random weights are enough to tell stripes apart, but a user has no use for them
        from modmeta.backbone import Backbone
        from modmeta.commands import check

        monkeypatch.setattr(check, "Backbone", lambda name, pretrained, size: Backbone(name, False, size))
    assert main(["check", str(striped), "--output", "out", "--suspects", "1", *words]) == 0
    lines, summary = read(Path("out"))
    found = next(each for each in summary["findings"] if each["kind"] == "suspicious_labels")
    assert found["cases"][0].startswith("paper/level/50.png looks more like upright")
    assert len(found["cases"]) == 1
    assert lines["paper/level/50.png"]["best_other_label"] == "upright"
    margins = {path: line["label_doubt"] for path, line in lines.items()}
    assert max(margins, key=margins.__getitem__) == "paper/level/50.png"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "the data folder nowhere does not exist"),
        (["hollow"], "the data folder hollow holds no image"),
        (["pictures", "--output", "pictures/out"], "lies in the folder to check"),
        (["pictures", "--output", "no/such/place"], "does not exist"),
        (["pictures", "--output", "file.txt"], "file.txt is a file"),
        (["pictures", "--output", "taken"], "exists; choose another --output or add --overwrite"),
        (["pictures", "--suspects", "-1"], "--suspects must be 0 or more"),
        (["pictures", "--workers", "0"], "--workers must be 1 or more"),
        (["pictures", "--backbone", "test_efficientnett"], "did you mean"),
        (["pictures", "--overwrit"], "did you mean --overwrite"),
        ([], "DIR"),
    ],
)
@pytest.mark.fault(21)
def test_wrong_words(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    clean(Path("pictures"), 1)
    Path("hollow/domain/class").mkdir(parents=True)
    Path("file.txt").touch()
    Path("taken").mkdir()
    Path("taken/check.json").write_text("old")
    assert main(["check", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert not Path("check-pictures").exists()
    assert Path("taken/check.json").read_text() == "old"


@pytest.mark.fault(20)
def test_a_full_disk_leaves_the_earlier_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean(Path("pictures"))
    assert main(["check", "pictures"]) == 0
    before = {name: Path("check-pictures", name).read_bytes() for name in FILES}
    picture(999).save("pictures/photo/cat/new.png")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["check", "pictures", "--overwrite"]) == 2
    assert "no space left" in capsys.readouterr().err.lower()
    assert {path.name: path.read_bytes() for path in Path("check-pictures").iterdir()} == before


def test_stopping_leaves_no_page_of_a_check_that_never_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(Path("pictures"))
    replace, moves = os.replace, []

    def stop_at_the_second(old: str, new: str) -> None:
        moves.append(new)
        if len(moves) == 2:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", stop_at_the_second)
    assert main(["check", "pictures"]) == 130
    assert [path.name for path in Path("check-pictures").iterdir()] == ["manifest.jsonl"]


def test_markup_in_names_is_only_text(capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("[red]", "[/nothing]", "a & b")):
        folder = Path("odd names", "[bold]", name)
        folder.mkdir(parents=True)
        picture(number).save(folder / "é [link].png")
    Path("odd names/[bold]/[red]/[b]bad.png").touch()
    assert main(["check", "odd names"]) == 2
    shown = capsys.readouterr().out
    assert "[bold]/[red]/[b]bad.png is empty" in shown
    assert "[/nothing]" in shown
    assert Path("check-odd names/check.html").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.fault(9)
def test_a_file_without_read_permission() -> None:
    clean(Path("pictures"))
    Path("pictures/photo/cat/0.png").chmod(0)
    assert main(["check", "pictures"]) == 2
    lines, _ = read(Path("check-pictures"))
    assert "Permission denied" in lines["photo/cat/0.png"]["reason"]


def test_help_needs_no_torch() -> None:
    script = "import sys; from modmeta.cli import main\ntry: main(['check', '--help'])\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("[]\n")
    assert "Exit code 2 means" in done.stdout
