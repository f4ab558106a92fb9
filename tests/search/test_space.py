import pytest

pytest.importorskip("optuna")

from modmeta.errors import ModmetaError
from modmeta.search.space import check_keys, from_optuna, lowest, read_space, to_optuna, with_values

FULL = {
    "data": {"image_size": 32, "shots": [1, 5]},
    "model": {"class_path": "M", "init_args": {"size": 32, "rate": 0.1, "units": [{"module": "film", "rate": 0.02}]}},
}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "give {low: A, high: B} or a list of choices"),
        ({"low": 1}, "give {low: A, high: B} or a list of choices"),
        ({"low": 5, "high": 1}, "rate in space.yaml: .*low"),
        ({"low": 0.0, "high": 1.0, "log": True}, "rate in space.yaml: .*low"),
        ({"low": 1, "high": 5, "lg": True}, "unknown option 'lg'; did you mean 'log'"),
        ({"low": 1, "high": "many"}, "rate in space.yaml: .*many"),
        ({"low": True, "high": 5}, "True is no number"),
        ({"low": 1, "high": 5, "log": "yes"}, "log is 'yes'; give true or false"),
        ([], "rate in space.yaml"),
    ],
)
def test_descriptions_that_cannot_be_used(value: object, message: str) -> None:
    with pytest.raises(ModmetaError, match=message):
        read_space({"rate": value}, "space.yaml")


@pytest.mark.parametrize("content", [None, [], {}])
def test_a_space_without_keys(content: object) -> None:
    with pytest.raises(ModmetaError, match=r"space.yaml names no key"):
        read_space(content, "space.yaml")


def test_whole_numbers_stay_whole_and_yaml_texts_become_numbers() -> None:
    space = read_space({"a": {"low": 1, "high": 3}, "b": {"low": "1e-3", "high": 1}, "c": [[1, 5], None]}, "")
    assert lowest(space) == {"a": 1, "b": 0.001, "c": [1, 5]}
    assert type(lowest(space)["a"]) is int


def test_choices_of_any_kind_go_through_optuna() -> None:
    space = read_space({"c": ["x", None, [1, 2], {"k": 1.5}, True]}, "")
    for value in ("x", None, [1, 2], {"k": 1.5}, True):
        parameters = to_optuna(space, {"c": value})
        assert space["c"]._contains(space["c"].to_internal_repr(parameters["c"]))
        assert from_optuna(space, parameters) == {"c": value}


def test_a_key_that_is_not_there_gets_the_nearest_one() -> None:
    for key, close in [
        ("model.init_args.units.0.rat", "model.init_args.units.0.rate"),
        ("model.init_args.units.1.rate", "model.init_args.units.0.rate"),
        ("data.imagesize", "data.image_size"),
    ]:
        with pytest.raises(ModmetaError, match=f"unknown key '{key}' in space.yaml; did you mean '{close}'"):
            check_keys(read_space({key: [1, 2]}, ""), FULL, "space.yaml")


def test_a_part_of_what_varies_as_a_whole() -> None:
    space = read_space({"data.shots": [[1, 2], [3, 4]], "data.shots.0": {"low": 1, "high": 2}}, "")
    with pytest.raises(ModmetaError, match=r"data.shots.0 in space.yaml is a part of data.shots"):
        check_keys(space, FULL, "space.yaml")


def test_values_are_set_and_interpolations_stay() -> None:
    config = {
        "data": {"shots": "${x}"},
        "model": {"class_path": "M", "init_args": {"size": "${data.image_size}", "units": [{"module": "film"}]}},
    }
    values = {"data.image_size": 64, "data.shots.1": 9, "model.init_args.units.0.rate": 0.5}
    assert with_values(config, FULL, values) == {
        "data": {"shots": [1, 9], "image_size": 64},
        "model": {
            "class_path": "M",
            "init_args": {"size": "${data.image_size}", "units": [{"module": "film", "rate": 0.5}]},
        },
    }
    assert config["data"] == {"shots": "${x}"}, "the original is left alone"


def test_what_the_file_gives_in_short_is_written_out() -> None:
    changed = with_values({"model": "M"}, FULL, {"model.init_args.units.0.rate": 0.5, "model.init_args.rate": 1.0})
    assert changed["model"]["class_path"] == "M"
    assert changed["model"]["init_args"]["units"] == [{"module": "film", "rate": 0.5}]
    assert with_values({}, FULL, {"data.image_size": 8}) == {"data": {"image_size": 8}}
    assert FULL["model"]["init_args"]["units"][0]["rate"] == 0.02
