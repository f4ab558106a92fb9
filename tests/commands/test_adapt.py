"""adapt and predict: from images to an adapter file, its card, and predictions."""

import csv
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from finished_run import Run
from PIL import Image

from modmeta.adapters.provenance import holds_image
from modmeta.cli import main
from modmeta.data.decode import decode_image


def adapt(run: Run, support: Path, output: str = "a.safetensors", *more: str) -> int:
    words = ["--checkpoint", str(run.checkpoint), "--support", str(support), "--output", output]
    return main(["adapt", *words, *more])


def predict(run: Run, images: Path, *more: str) -> list[dict[str, str]]:
    words = ["--checkpoint", str(run.checkpoint), "--adapter", "a.safetensors", "--images", str(images)]
    assert main(["predict", *words, "--output", "p.csv", *more]) == 0
    with open("p.csv", newline="") as table:
        return list(csv.DictReader(table))


def test_adapt_to_labelled_images_and_predict(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--domain", "neon") == 0
    assert Path("a.safetensors").stat().st_size < 1_000_000
    card = json.loads(Path("a.json").read_text())
    assert card["classes"] == ["0", "1", "2", "3"]
    assert card["provenance"]["images_per_class"] == {"0": 3, "1": 3, "2": 3, "3": 3}
    assert card["labelled"]
    moved = {unit["name"]: unit for unit in card["units"]}
    assert moved["film@all"]["open"]
    assert moved["film@all"]["moved"] > 0
    assert 0 < moved["film@all"]["relative_change"] < 1
    assert len(moved["film@all"]["rates"]) == 3
    page = Path("a.md").read_text()
    assert all(word in page for word in ("film@all", "neon", "sha256:", "torch", "nats per image"))

    rows = predict(tiny_run, tiny_run.flat)
    assert [row["image"] for row in rows] == sorted(path.name for path in tiny_run.flat.iterdir())
    assert {row["class"] for row in rows} <= {"0", "1", "2", "3"}
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    # The model has seen these very images, so it should be right about most.
    assert sum(row["class"] == row["image"][0] for row in rows) > len(rows) / 2


def test_adapt_to_images_without_labels_says_so(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(tiny_run, tiny_run.flat) == 0
    shown = capsys.readouterr().out
    assert "The images have no labels: only units that need none may act (norm_blend@all)" in shown
    card = json.loads(Path("a.json").read_text())
    assert not card["labelled"]
    assert len(card["classes"]) == 10
    assert {unit["name"]: unit["open"] for unit in card["units"]} == {
        "norm_blend@all": True,
        "film@all": False,
    }
    assert len(predict(tiny_run, tiny_run.flat)) == 12


def test_the_same_images_give_the_same_bytes(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support) == 0
    assert adapt(tiny_run, tiny_run.support, "b.safetensors") == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_predictions_are_those_of_any_batch_size_and_abstain(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support) == 0
    whole = predict(tiny_run, tiny_run.support)
    assert whole[0]["image"] == "0/0.png"
    single = predict(tiny_run, tiny_run.support, "--batch-size", "1")
    assert [row["class"] for row in single] == [row["class"] for row in whole]
    unsure = predict(tiny_run, tiny_run.support, "--abstain-below", "1")
    assert {row["abstained"] for row in unsure} == {"true"}


def test_a_budget_of_zero_takes_no_gradient_step(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--budget", "0") == 0
    units = {unit["name"]: unit for unit in json.loads(Path("a.json").read_text())["units"]}
    assert not units["film@all"]["open"]


def test_a_budget_is_a_share_of_the_backward_cost(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--budget", "0.5") == 0
    backward = json.loads(Path("a.json").read_text())["backward"]
    assert backward["budget"] == 0.5
    assert backward["share"] + backward["below_budget"] == 0.5
    assert 0 <= backward["share"] <= 0.5
    assert "below the budget" in Path("a.md").read_text()


@pytest.mark.parametrize("labelled", [True, False])
def test_an_explanation_is_shown_and_kept(labelled: bool, tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(tiny_run, tiny_run.support if labelled else tiny_run.flat, "a.safetensors", "--explain") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("what the policy saw", "effective rank", "what each unit did", "a.png"))
    explanation = json.loads(Path("a.json").read_text())["explanation"]
    units = {unit["name"]: unit for unit in explanation["units"]}
    assert units["norm_blend@all"]["effect"]["predictions"] > 0
    assert (units["film@all"]["effect"] is not None) == labelled
    assert (explanation["held_out_loss"] is not None) == labelled
    with Image.open("a.png") as picture:
        assert picture.format == "PNG"
    assert "a.png" in Path("a.md").read_text()
    before = {name: Path(name).read_bytes() for name in ("a.safetensors", "a.json", "a.md", "a.png")}
    Path("a.safetensors").unlink()
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--explain") == 2
    assert "a.md exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert all(Path(name).read_bytes() == before[name] for name in ("a.json", "a.md", "a.png"))


def test_an_explanation_changes_nothing_else(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support) == 0
    assert not Path("a.png").exists()
    assert "explanation" not in json.loads(Path("a.json").read_text())
    assert adapt(tiny_run, tiny_run.support, "b.safetensors", "--explain") == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_a_threshold_of_abstention_travels_in_the_adapter_file(
    tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--abstain-target", "0.8") == 0
    found = json.loads(Path("a.json").read_text())["provenance"]["abstention"]
    assert (found["target"], found["images"]) == (0.8, 12)
    assert found["kept"] == 0 or found["accuracy"] >= 0.8
    assert f"{found['images']} held-out images" in Path("a.md").read_text()
    capsys.readouterr()
    rows = predict(tiny_run, tiny_run.flat, "--abstain-below", "calibrated")
    for row in rows:
        if abs(float(row["probability"]) - found["threshold"]) > 1e-5:  # the table is rounded
            assert (row["abstained"] == "true") == (float(row["probability"]) < found["threshold"])
    assert f"abstained below {found['threshold']:.3f}" in capsys.readouterr().out


def test_thresholds_of_abstention_that_cannot_be_had(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(tiny_run, tiny_run.flat, "a.safetensors", "--abstain-target", "0.9") == 2
    assert "--abstain-target needs labelled images" in capsys.readouterr().err
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--abstain-target", "9") == 2
    assert "--abstain-target must lie in 0..1" in capsys.readouterr().err
    assert not Path("a.safetensors").exists()
    assert adapt(tiny_run, tiny_run.support) == 0
    words = ["--checkpoint", str(tiny_run.checkpoint), "--adapter", "a.safetensors", "--images", str(tiny_run.flat)]
    for given, expected in (
        ("calibrated", "the adapter file holds no threshold; adapt with --abstain-target"),
        ("2", "--abstain-below must lie in 0..1 or be `calibrated`, got 2"),
        ("often", "--abstain-below must lie in 0..1 or be `calibrated`, got often"),
    ):
        assert main(["predict", *words, "--output", "p.csv", "--abstain-below", given]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert len(error.splitlines()) == 1
    assert not Path("p.csv").exists()


def test_nothing_is_overwritten_unasked(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.safetensors").write_text("precious")
    assert adapt(tiny_run, Path("no such folder")) == 2
    assert "a.safetensors exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert Path("a.safetensors").read_text() == "precious"
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--overwrite") == 0


def make_support(kind: str) -> Path:
    folder = Path(kind.replace(" ", "_"))
    names = {
        "one class": ["a/0.png"],
        "mixed": ["a/0.png", "b/0.png", "0.png"],
        "empty": [],
        "no image": ["a/0.png"],
    }
    folder.mkdir()
    for name in names[kind]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    if kind == "no image":
        (folder / "b").mkdir()
        (folder / "b/0.png").write_text("text")
    return folder


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("one class", "has one class, 'a'; give two or more"),
        ("mixed", "holds images beside class folders, such as 0.png"),
        ("empty", "holds no image"),
        ("no image", "b/0.png is no image of a known format"),
    ],
)
def test_support_that_cannot_be_used(
    kind: str, expected: str, tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(tiny_run, make_support(kind)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not Path("a.safetensors").exists()


def few_of(run: Run, images: dict[str, int]) -> Path:
    """Copy so many support images of some classes."""
    for name, count in images.items():
        (Path("few") / name).mkdir(parents=True)
        for path in sorted((run.support / name).iterdir())[:count]:
            shutil.copy(path, Path("few") / name)
    return Path("few")


@pytest.mark.fault(11)
def test_one_image_of_each_class_will_do(tiny_run: Run) -> None:
    assert adapt(tiny_run, few_of(tiny_run, dict.fromkeys("0123", 1))) == 0
    card = json.loads(Path("a.json").read_text())
    assert card["provenance"]["images_per_class"] == dict.fromkeys("0123", 1)
    assert len(predict(tiny_run, tiny_run.flat)) == 12


@pytest.mark.fault(12)
def test_a_class_folder_without_images_is_named(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(tiny_run, few_of(tiny_run, {"0": 2, "1": 2, "2": 0})) == 2
    assert "the class folder few/2 holds no image; put some into it, or remove it" in capsys.readouterr().err
    assert not Path("a.safetensors").exists()


@pytest.mark.fault(13, 14)
def test_classes_are_told_by_name_and_those_without_support_are_never_named(tiny_run: Run) -> None:
    """In the sources' order of classes, these are the second and the fourth."""
    assert adapt(tiny_run, few_of(tiny_run, {"3": 3, "1": 3})) == 0
    rows = predict(tiny_run, tiny_run.flat)  # images of 0 and 2, too
    assert {row["class"] for row in rows} <= {"1", "3"}
    seen = [row for row in rows if row["image"][0] in "13"]
    assert sum(row["class"] == row["image"][0] for row in seen) > len(seen) / 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--checkpoint", "missing.ckpt"], "checkpoint missing.ckpt does not exist"),
        (["--checkpoint", "garbage.ckpt"], "checkpoint garbage.ckpt cannot be read"),
        (["--output", "a.pt"], "should end with .safetensors"),
        (["--output", "nowhere/a.safetensors"], "the folder nowhere does not exist"),
        (["--budget", "2"], "--budget must lie in 0..1"),
        (["--modules", "nope.py"], "the file nope.py does not exist"),
    ],
)
def test_options_that_cannot_be_used(
    words: list[str], expected: str, tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("garbage.ckpt").write_bytes(b"garbage")
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", *words) == 2
    assert expected in capsys.readouterr().err


def test_an_adapter_of_another_training_is_refused(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--config",
        str(tiny_run.config),
        "--seed_everything",
        "1",
        "--model.init_args.backbone.seed",
        "1",
    ]
    assert main(["fit", *words, "--name", "other"]) == 0
    assert adapt(tiny_run, tiny_run.support) == 0
    capsys.readouterr()
    words = ["--adapter", "a.safetensors", "--images", str(tiny_run.flat), "--output", "p.csv"]
    assert main(["predict", "--checkpoint", "runs/other/version_0/checkpoints/last.ckpt", *words]) == 2
    error = capsys.readouterr().err
    assert "a.safetensors is for another backbone: its fingerprint is sha256:" in error
    assert not Path("p.csv").exists()


@pytest.mark.fault(1, 3)
def test_an_image_that_cannot_be_decoded_has_a_row_without_a_class(
    tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(tiny_run, tiny_run.support) == 0
    good = next(tiny_run.support.rglob("*.png"))
    Path("broken").mkdir()
    Path("broken/b.png").write_text("text")
    capsys.readouterr()
    words = ["--checkpoint", str(tiny_run.checkpoint), "--adapter", "a.safetensors", "--images", "broken"]
    assert main(["predict", *words, "--output", "p.csv"]) == 2
    assert "broken/b.png is no image of a known format" in capsys.readouterr().err
    assert not Path("p.csv").exists()
    for name in ("a", "c"):
        shutil.copy(good, f"broken/{name}.png")
    assert main(["predict", *words, "--output", "p.csv"]) == 0
    shown = capsys.readouterr()
    assert "no class: image broken/b.png is no image of a known format" in shown.err
    assert "3 images, 0 abstained, 1 that cannot be used" in shown.out
    first, broken, last = Path("p.csv").read_text().splitlines()[1:]
    assert broken == "b.png,,,true"
    assert first.removeprefix("a.png,") == last.removeprefix("c.png,")


def tell_tale_support(run: Run, folder: Path) -> tuple[list[bytes], list[bytes]]:
    """Copy the support as JPEG and PNG files with telling names and metadata; return names and tags, and pixels."""
    exif = Image.Exif()
    exif[0x013B], exif[0x010F] = "TELLTALE-ARTIST", "TELLTALE-CAMERA"
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    words, rows = [b"TELLTALE", b"Exif\0\0", b"telltale"], []
    for number, path in enumerate(sorted(run.support.rglob("*.png"))):
        target = folder / path.parent.name / f"telltale-{number}{('.jpg', '.png')[number % 2]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.save(target, exif=exif)
        assert b"TELLTALE-ARTIST" in target.read_bytes()
        rows += pixel_pieces(target)
    return words, rows


def pixel_pieces(path: Path) -> list[bytes]:
    """Return pieces of an image as the backbone is given it, in the layouts and types in which it could be stored."""
    pixels = decode_image(path, 32)
    layouts = (pixels, pixels.permute(1, 2, 0).contiguous())
    kinds = [kind for layout in layouts for kind in (layout, layout.float(), layout.float() / 255)]
    # A piece of few values could stand anywhere.
    return [piece.numpy().tobytes() for kind in kinds for piece in kind.flatten().split(32) if len(piece.unique()) > 6]


@pytest.mark.parametrize("words", [(), ("--provenance", "none"), ("--epsilon", "3"), ("--provenance", "full")], ids=str)
def test_nothing_written_holds_an_image_or_its_metadata(
    words: tuple[str, ...], tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, rows = tell_tale_support(tiny_run, tmp_path / "telltale-folder")
    out = tmp_path / "out"
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        (out / variable).mkdir(parents=True)
        monkeypatch.setenv(variable, str(out / variable))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(out)
    more = () if "--epsilon" in words else ("--explain", "--abstain-target", "0.8")
    assert adapt(tiny_run, tmp_path / "telltale-folder", "a.safetensors", *words, *more) == 0
    written = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert set(written) >= {"a.safetensors", "a.json", "a.md"}
    if "a.png" in written:
        with Image.open("a.png") as picture:
            written["the picture's pixels"] = picture.tobytes()
    for name, data in written.items():
        assert not [row for row in rows if row in data], name
    found = {word for word in told for data in written.values() if word in data}
    assert found == ({b"telltale"} if "full" in words else set())
    if "full" in words:
        assert all(f"telltale-{n}.".encode() in written[name] for n in range(12) for name in ("a.safetensors", "a.md"))


def test_the_search_for_pixels_would_find_them(tiny_run: Run) -> None:
    path = tiny_run.support / "0" / "0.png"
    rows = pixel_pieces(path)
    for stored in (decode_image(path, 32), decode_image(path, 32).float().permute(1, 2, 0).contiguous() / 255):
        assert sum(row in stored.numpy().tobytes() for row in rows) > 8


def test_the_adapter_file_knows_its_images_again(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support) == 0
    origin = json.loads(Path("a.json").read_text())["provenance"]
    assert len(origin["hashes"]) == 12
    assert holds_image(origin, decode_image(tiny_run.support / "1" / "2.png", 32))
    assert not holds_image(origin, 255 - decode_image(tiny_run.support / "1" / "2.png", 32))
    assert "12 salted hashes" in Path("a.md").read_text()
    assert adapt(tiny_run, tiny_run.support, "b.safetensors", "--provenance", "none") == 0
    assert "hashes" not in json.loads(Path("b.json").read_text())["provenance"]
    assert "names no image" in Path("b.md").read_text()


def test_adapt_in_private(tiny_run: Run) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", "--epsilon", "3", "--delta", "1e-4", "--clip", "0.5") == 0
    card = json.loads(Path("a.json").read_text())
    told = card["provenance"]["privacy"]
    assert (told["epsilon"], told["delta"], told["clip"], told["steps"]) == (3.0, 1e-4, 0.5, 3)
    assert told["epsilon_spent"] <= 3.0
    assert told["noise_deviation"] == pytest.approx(2 * 0.5 * told["noise_multiplier"])
    # None of what an ordinary adaptation tells of its images without noise.
    assert (card["verdict"], card["expected_gain"], card["support_losses"]) == (None, None, [])
    assert not {"hashes", "salt", "names", "abstention"} & set(card["provenance"])
    assert "(3, 0.0001)-differential privacy" in Path("a.md").read_text()
    assert len(predict(tiny_run, tiny_run.flat)) == 12
    assert adapt(tiny_run, tiny_run.support, "b.safetensors", "--epsilon", "3", "--delta", "1e-4") == 0
    assert Path("a.safetensors").read_bytes() != Path("b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--epsilon", "0"], "epsilon must be above 0"),
        (["--epsilon", "inf"], "--epsilon inf promises nothing"),
        (["--epsilon", "3", "--delta", "2"], "delta must lie between 0 and 1"),
        (["--delta", "1e-5"], "--delta belongs to a private adaptation"),
        (["--clip", "1"], "--clip belongs to a private adaptation"),
        (["--epsilon", "3", "--explain"], "--explain looks at the images without noise"),
        (["--epsilon", "3", "--abstain-target", "0.9"], "--abstain-target looks at the images without noise"),
        (["--epsilon", "3", "--provenance", "hashes"], "--provenance hashes would tell which images"),
    ],
)
def test_what_cannot_be_private_is_refused(
    words: list[str], expected: str, tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(tiny_run, tiny_run.support, "a.safetensors", *words) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not Path("a.safetensors").exists()


def test_private_adaptation_needs_labels_of_known_classes(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(tiny_run, tiny_run.flat, "a.safetensors", "--epsilon", "3") == 2
    assert "a private adaptation needs labelled images" in capsys.readouterr().err
    for name in ("0", "zebra"):
        shutil.copytree(tiny_run.support / "1", Path("new") / name)
    assert adapt(tiny_run, Path("new"), "a.safetensors", "--epsilon", "3") == 2
    assert "class 'zebra' is new to the source domains" in capsys.readouterr().err
