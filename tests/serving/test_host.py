"""The host: every answer is exactly one adapter's, whatever is exchanged meanwhile."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from modmeta.adaptation import Adapted, Classifier, Plan
from modmeta.adapters import AdaptedBackbone, UnitConfig
from modmeta.adapters.adapter_file import read_adapter, write_adapter
from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError
from modmeta.serving import AdapterHost, Prediction

UNITS = [
    UnitConfig("film", depth=(0.5, 1.0)),
    UnitConfig("lora", {"rank": 2}, group="all"),
    UnitConfig("projection", {"rank": 2}),
]
SWAPS, THREADS = 2_000, 8


@pytest.fixture(autouse=True)
def _threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def model() -> AdaptedBackbone:
    return AdaptedBackbone(Backbone("test_efficientnet", False, 32), UNITS)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def adapted(model: AdaptedBackbone, seed: int, *closed: str, ways: int = 3) -> Adapted:
    """Return an adaptation to a domain of its own, with some kinds of units closed."""
    generator = torch.Generator().manual_seed(seed)
    names, width = tuple(unit.name for unit in model.units), model.backbone.feature_dim
    gates = torch.tensor([0.0 if name.startswith(closed) else 0.7 for name in names])
    scalar, rows = torch.tensor(0.5), torch.zeros(len(names))
    plan = Plan(names, gates, torch.full((len(names), 2), 0.02), rows, torch.ones(len(names), 1), *3 * (scalar,))
    state = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in model.fresh().items()}
    weight = torch.randn(width, ways, generator=generator)
    head = Classifier(weight, torch.zeros(ways), torch.zeros(width), torch.tensor(3.0), seed % 2 == 0)
    return Adapted(state, plan, head, tuple(f"class{seed}-{way}" for way in range(ways)))


@torch.no_grad()
def oracle(model: AdaptedBackbone, one: Adapted, images: Tensor) -> Tensor:
    """Return the logits of one adaptation without any host."""
    return one.classifier(model(images, one.state, one.plan.gate_of()))


def logits(predictions: list[Prediction]) -> Tensor:
    return torch.stack([each.logits for each in predictions])


def test_an_answer_is_the_adapters_own_bit_for_bit(model: AdaptedBackbone, images: Tensor) -> None:
    host = AdapterHost(model)
    for seed, closed in enumerate([(), ("film",), ("lora", "projection"), ("film", "lora", "projection")]):
        one = adapted(model, seed, *closed, ways=2 + seed)
        version = host.add(f"domain{seed}", one)
        predictions = host.predict(images, f"domain{seed}")
        expected = oracle(model, one, images)
        assert torch.equal(logits(predictions), expected)
        assert {each.adapter for each in predictions} == {version}
        assert [each.label for each in predictions] == [one.classes[row] for row in expected.argmax(1).tolist()]
        assert [each.probability for each in predictions] == expected.softmax(1).amax(1).tolist()
    assert host.versions["domain3"] == version
    assert host.predict(images[:0], "domain0") == []


def test_a_batch_may_mix_domains(model: AdaptedBackbone, images: Tensor) -> None:
    host, many = AdapterHost(model), torch.cat([images, images.flip(2), images.flip(3)])
    for seed in range(3):
        host.add(str(seed), adapted(model, seed, ways=seed + 2))
    domains = ["2", "0", "1", "0", "2", "2"]
    mixed = host.predict(many, domains)
    assert [each.adapter.domain for each in mixed] == domains
    for name in "012":
        rows = [row for row, domain in enumerate(domains) if domain == name]
        # The same images in one batch of one domain: nothing but the sorting may differ.
        assert torch.equal(logits([mixed[row] for row in rows]), logits(host.predict(many[rows], name)))
        alone = torch.cat([logits(host.predict(many[row : row + 1], name)) for row in rows])
        torch.testing.assert_close(logits([mixed[row] for row in rows]), alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModmetaError, match="6 images have 2 domains"):
        host.predict(many, ["0", "1"])


@pytest.mark.fault(31)
def test_exchanges_under_traffic(model: AdaptedBackbone, images: Tensor) -> None:
    """While adapters come and go, every answer is wholly that of the version it names."""
    few = [UnitConfig("film", names=["*.3.*"], group="all"), UnitConfig("projection", {"rank": 2})]
    model = AdaptedBackbone(model.backbone, few)
    pool = [adapted(model, seed) for seed in range(6)]
    expected = [oracle(model, one, images) for one in pool]
    host, over = AdapterHost(model), Event()
    made = {host.add("a", pool[0]): 0, host.add("b", pool[1]): 1}  # which of the pool each version is

    def predict(seed: int) -> list[Prediction]:
        rng, found = random.Random(seed), []
        while not over.wait(0.15):  # a pause, for on few cores the exchanges would otherwise hardly get a turn
            domain = rng.choice(("a", "b", ["a", "b"]))
            if isinstance(domain, str):
                found += host.predict(images, domain)
            else:  # two groups of one image each
                first, second = host.predict(images, domain)
                assert (first.adapter.domain, second.adapter.domain) == ("a", "b")
        return found

    def exchange() -> None:
        rng, older = random.Random(99), {"a": False, "b": False}
        for _ in range(SWAPS):
            domain, which = rng.choice("ab"), rng.randrange(len(pool))
            if older[domain] and rng.random() < 0.2:
                host.rollback(domain)
                older[domain] = False
            else:
                made[host.replace(domain, pool[which])] = which
                older[domain] = True

    with ThreadPoolExecutor(THREADS) as threads:
        running = [threads.submit(predict, seed) for seed in range(THREADS)]
        try:
            exchange()
        finally:
            over.set()
        seen = [answer for each in running for answer in each.result()]
    assert len({each.adapter for each in seen}) > 20, "no exchange came between predictions"
    for row, each in enumerate(seen):
        assert torch.equal(each.logits, expected[made[each.adapter]][row % 2])
        assert each.classes == pool[made[each.adapter]].classes


def test_a_domain_that_goes_while_threads_predict(model: AdaptedBackbone, images: Tensor) -> None:
    host, over, one, two = AdapterHost(model), Event(), adapted(model, 1), adapted(model, 2)
    expected = {"stays": oracle(model, one, images), "goes": oracle(model, two, images)}
    host.add("stays", one)

    def predict(domain: str) -> tuple[int, int]:
        answered = refused = 0
        while not over.wait(0.005):
            try:
                assert torch.equal(logits(host.predict(images, domain)), expected[domain])
                answered += 1
            except ModmetaError as error:
                refused += "unknown domain 'goes' in the host" in str(error)
        return answered, refused

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(predict, domain) for domain in ("stays", "stays", "goes", "goes")]
        try:
            for _ in range(50):
                host.add("goes", two)
                host.predict(images, "goes")
                host.remove("goes")
                host.predict(images, "stays")
        finally:
            over.set()
        stays, _, goes, _ = [each.result() for each in running]
    assert stays[0]
    assert stays[1] == 0
    assert goes[1]


def test_going_back_to_the_version_before(model: AdaptedBackbone, images: Tensor) -> None:
    host, ones = AdapterHost(model), [adapted(model, seed) for seed in range(3)]
    first = host.add("a", ones[0])
    second = host.replace("a", ones[1])
    assert second.number > first.number
    assert host.rollback("a") == first
    assert torch.equal(logits(host.predict(images, "a")), oracle(model, ones[0], images))
    with pytest.raises(ModmetaError, match="'a' has no earlier adapter"):
        host.rollback("a")
    third = host.replace("a", ones[2])
    assert third.number > second.number  # a number once given is never given again
    host.remove("a")
    with pytest.raises(ModmetaError, match="unknown domain 'a'"):
        host.rollback("a")
    assert host.add("a", ones[0]).number > third.number
    with pytest.raises(ModmetaError, match="no earlier adapter"):
        host.rollback("a")


def test_more_than_one_version_is_kept_where_asked_for(model: AdaptedBackbone) -> None:
    host = AdapterHost(model, history=2)
    versions = [host.add("a", adapted(model, 0)), *(host.replace("a", adapted(model, seed)) for seed in (1, 2, 3))]
    assert [host.rollback("a"), host.rollback("a")] == [versions[2], versions[1]]
    with pytest.raises(ModmetaError, match="no earlier adapter"):
        host.rollback("a")


def test_names_of_domains(model: AdaptedBackbone, images: Tensor) -> None:
    host = AdapterHost(model)
    host.add("sketch", adapted(model, 0))
    for call in (host.predict, lambda images, domain: host.replace(domain, adapted(model, 0))):
        with pytest.raises(ModmetaError, match="unknown domain 'scetch' in the host; did you mean 'sketch'"):
            call(images, "scetch")
    with pytest.raises(ModmetaError, match="'sketch' has an adapter; replace it"):
        host.add("sketch", adapted(model, 1))


def test_what_is_resident_is_a_copy(model: AdaptedBackbone, images: Tensor) -> None:
    host, one = AdapterHost(model), adapted(model, 0)
    host.add("a", one)
    before = oracle(model, one, images)
    for tensor in [*one.state.values(), one.classifier.weight, one.plan.gates]:
        tensor.zero_()
    assert torch.equal(logits(host.predict(images, "a")), before)


def test_a_file_answers_as_what_it_was_written_from(model: AdaptedBackbone, images: Tensor, tmp_path: Path) -> None:
    host, one = AdapterHost(model), adapted(model, 0, "lora")
    digest = write_adapter(tmp_path / "a.safetensors", model, one.to_file({}))
    version = host.load("a", tmp_path / "a.safetensors")
    assert version.sha256 == digest == host.add("b", one).sha256 != host.add("c", adapted(model, 2)).sha256
    assert torch.equal(logits(host.predict(images, "a")), oracle(model, one, images))
    again = host.load("a", tmp_path / "a.safetensors")  # in place of the first
    assert again.number > version.number
    assert host.rollback("a") == version


def test_adapters_of_other_units_on_the_same_backbone(model: AdaptedBackbone, images: Tensor, tmp_path: Path) -> None:
    other = AdaptedBackbone(model.backbone, [UnitConfig("lora", {"rank": 3}, group="all"), UnitConfig("scale")])
    one, two = adapted(model, 0), adapted(other, 1)
    write_adapter(tmp_path / "two.safetensors", other, two.to_file({}))
    alone = AdapterHost(model)
    for call in (lambda: alone.add("two", two), lambda: alone.load("two", tmp_path / "two.safetensors")):
        with pytest.raises(ModmetaError, match="unit") as caught:
            call()
        assert str(caught.value).isprintable()
    assert not alone.versions
    host = AdapterHost(model, other)
    host.add("one", one)
    host.load("two", tmp_path / "two.safetensors")
    host.add("three", two)
    assert torch.equal(logits(host.predict(images, "one")), oracle(model, one, images))
    assert torch.equal(logits(host.predict(images, "two")), oracle(other, two, images))
    assert torch.equal(logits(host.predict(images, "three")), oracle(other, two, images))


@pytest.mark.fault(25, 29, 32)
def test_foreign_adapters_are_refused_and_nothing_changes(
    model: AdaptedBackbone, images: Tensor, tmp_path: Path
) -> None:
    stranger = AdaptedBackbone(Backbone("test_efficientnet", False, 32, seed=1), UNITS)
    write_adapter(tmp_path / "a.safetensors", stranger, adapted(stranger, 0).to_file({}))
    host, one = AdapterHost(model), adapted(model, 0)
    version = host.add("a", one)
    with pytest.raises(ModmetaError, match="for another backbone: its fingerprint"):
        host.load("a", tmp_path / "a.safetensors")
    with pytest.raises(ModmetaError, match="a host has one backbone"):
        AdapterHost(model, stranger)
    broken = dict(one.state)
    name = next(name for name in broken if name.startswith("film"))
    broken[name] = torch.full_like(broken[name], torch.nan)
    with pytest.raises(ModmetaError, match="is not finite"):
        host.replace("a", replace(one, state=broken))
    with pytest.raises(ModmetaError, match=r"tensor 'head:weight' is \(\d+, 3\), not \(\d+, 2\)"):
        host.replace("a", replace(one, classes=("x", "y")))
    del broken[name]
    with pytest.raises(ModmetaError, match="is missing"):
        host.replace("a", replace(one, state=broken))
    assert host.versions == {"a": version}
    assert torch.equal(logits(host.predict(images, "a")), oracle(model, one, images))


def test_the_backbone_stays_as_it_is(model: AdaptedBackbone, images: Tensor, tmp_path: Path) -> None:
    before = model.backbone.fingerprint()
    host = AdapterHost(model)
    host.add("a", adapted(model, 0))
    host.predict(images, "a")
    host.remove("a")
    assert model.backbone.fingerprint() == before
    write_adapter(tmp_path / "a.safetensors", model, adapted(model, 0).to_file({}))
    assert read_adapter(tmp_path / "a.safetensors", model).classes == adapted(model, 0).classes
