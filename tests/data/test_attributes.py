"""Attributes of classes: what is read from a CSV file, and what is refused."""

from pathlib import Path

import pytest
import torch

from modmeta.data import DigitsDomains, DomainDataModule, read_attributes
from modmeta.errors import ModmetaError

GOOD = "class,stripes,legs\nzebra,1,4\nhen,0,2\n"


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "animals.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD,
        "\n" + GOOD + "\n,,\n",
        'class , stripes,legs\n"zebra", 1 ,4e0\nhen,0,2',
    ],
)
def test_one_row_per_class(text: str, tmp_path: Path) -> None:
    found = read_attributes(written(tmp_path, text))
    assert (found.classes, found.names) == (("zebra", "hen"), ("stripes", "legs"))
    assert torch.equal(found.values, torch.tensor([[1.0, 4.0], [0.0, 2.0]]))
    assert torch.equal(found.of(["hen", "zebra", "hen"]), torch.tensor([[0.0, 2.0], [1.0, 4.0], [0.0, 2.0]]))


def test_the_embedded_digits_have_attributes_of_their_own() -> None:
    found = read_attributes("digits")
    values = found.of(DigitsDomains().classes)
    assert values.shape == (10, len(found.names))
    assert len({tuple(row) for row in values.tolist()}) == 10
    # A seven-segment display lights these many segments for 0 to 9.
    assert values[:, :7].sum(1).tolist() == [6, 2, 5, 5, 4, 5, 6, 3, 7, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no classes"),
        ("class,stripes\n", "has no classes"),
        ("name,stripes\nzebra,1\n", "must begin with a header class,ATTRIBUTE,"),
        ("class;stripes\nzebra;1\n", "with commas, and begins with 'class;stripes'"),
        ("class\nzebra\n", "must begin with a header"),
        ("class,stripes,stripes\nzebra,1,1\n", "2 columns are named 'stripes'"),
        ("class,stripes,\nzebra,1,1\n", "1 columns are named ''"),
        (GOOD + "hen,1\n", "line 4: 2 columns, and the header has 3"),
        (GOOD + "hen,1,1,1\n", "line 4: 4 columns"),
        (GOOD + "hen,1,1\n", "line 4: class 'hen' is there twice"),
        (GOOD + ",1,1\n", "line 4: the class has no name"),
        (GOOD + "fox,nan,4\n", "line 4, column 'stripes': 'nan' is no finite number"),
        (GOOD + "fox,0,inf\n", "line 4, column 'legs': 'inf' is no finite number"),
        (GOOD + "fox,0,1e39\n", "'1e39' is no finite number"),
        (GOOD + "fox,,4\n", "column 'stripes': '' is no finite number"),
        (GOOD + "fox,red,4\n", "'red' is no finite number"),
        (b"class,a\n\xff\xfe,1\n", "is no CSV file in UTF-8"),
        ('class,a\n"zebra,1\n', "is no CSV file"),
    ],
)
def test_a_broken_file_is_one_clear_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModmetaError) as error:
        read_attributes(written(tmp_path, text))
    assert message in str(error.value)
    assert "animals.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_missing_class_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match="cannot be read"):
        read_attributes(str(tmp_path / "nowhere.csv"))
    with pytest.raises(ModmetaError, match="unknown class 'zebu' in the attributes; did you mean 'zebra'"):
        read_attributes(written(tmp_path, GOOD)).of(["hen", "zebu"])


def test_a_test_may_hold_seen_classes_beside_new_ones() -> None:
    wanted = {"test_domains": ["ink"], "test_classes": ["9", "3"], "eval_shots": [0, 2], "queries": 3}
    data = DomainDataModule(**wanted, test_seen_classes=True)
    data.setup("test")
    episode = data.episode("test", 0)
    assert episode.classes == tuple("0123456789")
    assert episode.shots == len(episode.support) == len(episode.support_labels) == 0
    assert episode.query_labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert data.episode("test", 1).support_labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert data.classes == tuple("01245678")
    alone = DomainDataModule(**wanted)
    alone.setup("test")
    assert alone.episode("test", 0).classes == ("3", "9")


@pytest.mark.parametrize("options", [{"test_domains": ["ink"]}, {"test_classes": ["3", "9"]}])
def test_seen_classes_are_tested_on_images_that_training_leaves_out(options: dict) -> None:
    with pytest.raises(ModmetaError, match="test_seen_classes asks for test_classes, and for test_domains"):
        DomainDataModule(test_seen_classes=True, **options).setup("test")
