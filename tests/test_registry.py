"""The registry: names added by decorators and entry points, and clear words about those that are not there."""

from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from modmeta import registry as registry_module
from modmeta.errors import ModmetaError, nearest, unknown
from modmeta.registry import Registry


@pytest.fixture
def animals() -> Registry[type]:
    registry: Registry[type] = Registry("animal")

    @registry.register("dog")
    class Dog:
        pass

    @registry.register("cat")
    class Cat:
        pass

    return registry


def with_plugins(monkeypatch: pytest.MonkeyPatch, **values: str) -> Registry[type]:
    entries = [EntryPoint(name, value, "test.animals") for name, value in values.items()]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [e for e in entries if e.group == group])
    return Registry("animal", group="test.animals")


def test_names_are_sorted_and_found(animals: Registry[type]) -> None:
    assert animals.names() == list(animals) == ["cat", "dog"]
    assert animals.get("cat").__name__ == "Cat"
    assert "cat" in animals
    assert "cow" not in animals


def test_an_unknown_name_gets_the_nearest(animals: Registry[type]) -> None:
    with pytest.raises(ModmetaError, match=r"^unknown animal 'dgo'; did you mean 'dog'\?$"):
        animals.get("dgo")
    with pytest.raises(ModmetaError, match=r"^unknown animal 'elephant'; known: cat, dog$"):
        animals.get("elephant")
    with pytest.raises(ModmetaError, match="none is known here"):
        Registry("animal").get("cat")


def test_a_name_is_taken_once(animals: Registry[type]) -> None:
    class Other:
        pass

    with pytest.raises(ModmetaError, match=r"animal 'cat' is registered already by .*Cat; choose another name"):
        animals.register("cat")(Other)
    assert animals.get("cat").__name__ == "Cat"
    assert animals.register("cat", override=True)(Other) is Other
    assert animals.get("cat") is Other


def test_a_cell_that_is_run_again_replaces_its_class(animals: Registry[type]) -> None:
    def define() -> type:
        @animals.register("cow")
        class Cow:
            pass

        return Cow

    first, second = define(), define()
    assert first is not second
    assert animals.get("cow") is second


def test_a_plugin_is_imported_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = with_plugins(monkeypatch, fraction="fractions:Fraction", broken="no_such_package:Thing")
    assert plugins.names() == ["broken", "fraction"]
    assert "broken" in plugins
    from fractions import Fraction

    assert plugins.get("fraction") is Fraction
    with pytest.raises(ModmetaError, match="animal 'broken' could not be imported from no_such_package:Thing: Module"):
        plugins.get("broken")
    with pytest.raises(ModmetaError, match="did you mean 'fraction'"):
        plugins.get("fractoin")


def test_a_plugin_that_registers_itself_is_no_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = with_plugins(monkeypatch, self_made="registering_plugin:Thing")

    class Plugin(ModuleType):
        def __getattr__(self, name: str) -> type:
            thing = type("Thing", (), {"__module__": "registering_plugin"})
            return plugins.register("self_made")(thing)

    monkeypatch.setitem(__import__("sys").modules, "registering_plugin", Plugin("registering_plugin"))
    assert plugins.get("self_made").__name__ == "Thing"
    assert plugins.names() == ["self_made"]


def test_the_modules_that_ship_are_found_by_entry_points() -> None:
    from modmeta.adapters import MODULES

    assert {"film", "lora", "norm_blend", "projection"} <= set(MODULES.names())
    assert MODULES.get("film").__module__ == "modmeta_modules.film"


def test_the_nearest_name_ignores_case() -> None:
    assert nearest("PHOTO", ["photo", "art"]) == "photo"
    assert nearest("Photo ", ["PHOTOS", "art"]) == "PHOTOS"
    assert nearest("xyz", ["photo", "art"]) is None
    assert str(unknown("domain", "x", [f"d{i:02}" for i in range(20)], "here")).endswith("d11, ...")
    assert " in here;" in str(unknown("domain", "x", [], "here"))
