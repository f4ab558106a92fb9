"""No domain changes another: whatever happens to domain B, the logits of A stay what they are, bit for bit."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import Adapted, Classifier, Plan, inner_loop
from modmeta.adapters import AdaptedBackbone, Bank, State, UnitConfig
from modmeta.serving import AdapterHost

WAYS, CHANGES = 3, 100
MODULES = {
    "test_efficientnet": ("norm_blend", "film", "lora", "residual", "projection"),  # batch normalisation
    "test_efficientnet_gn": ("film", "lora", "residual", "projection"),  # group normalisation
    "test_convnext": ("film", "lora", "bottleneck", "projection"),  # layer normalisation
}


def plan_for(model: AdaptedBackbone) -> Plan:
    names = tuple(unit.name for unit in model.units)
    scalar, per_unit = torch.tensor(0.5), torch.full((len(names),), 0.7)
    return Plan(names, per_unit, torch.full((len(names), 1), 0.05), 0 * per_unit, per_unit[:, None], *3 * (scalar,))


def adapt(model: AdaptedBackbone, initial: State, seed: int) -> Adapted:
    """Train a few images of a domain into the modules."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(6, 3, 32, 32, generator=generator) * torch.rand(1, 3, 1, 1, generator=generator)
    labels = torch.arange(6) % WAYS
    weight = torch.randn(model.backbone.feature_dim, WAYS, generator=generator)
    plan = plan_for(model)
    state, losses = inner_loop(model, initial, plan, images, lambda x: F.cross_entropy(x @ weight, labels))
    assert len(losses) == 1
    state = {name: tensor.detach() for name, tensor in state.items()}
    head = Classifier(weight, torch.zeros(WAYS), torch.zeros(len(weight)), torch.tensor(1.0), True)
    return Adapted(state, plan, head, ("x", "y", "z"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("test_efficientnet", marks=pytest.mark.fault(34)),
        "test_efficientnet_gn",
        "test_convnext",
    ],
)
def test_no_change_of_domain_b_moves_a_bit_of_domain_a(
    name: str, make: Callable[..., AdaptedBackbone], images: Tensor
) -> None:
    model = make(name, *(UnitConfig(module, group="all") for module in MODULES[name]))
    fingerprint = model.backbone.fingerprint()
    bank, host, rng = Bank(model), AdapterHost(model, history=3), random.Random(name)
    start = {key: tensor.detach() for key, tensor in bank.initial().items()}
    a = adapt(model, start, seed=0)
    bank.add("a", a.state, mean=torch.zeros(model.backbone.feature_dim))
    version = host.add("a", a)

    def logits() -> tuple[Tensor, ...]:
        with torch.no_grad():
            kept = a.state | bank.specialist("a")
            alone = a.classifier(model(images, kept, a.plan.gate_of()))
        return alone, torch.stack([each.logits for each in host.predict(images, "a")])

    before = logits()
    with torch.no_grad():
        plain = a.classifier(model.backbone(images))
    assert not torch.equal(before[0], plain), "domain A is not adapted at all"
    done: dict[str, int] = {}
    for change in range(CHANGES):
        kinds = ["train and replace", "go back", "remove"] if "b" in host.versions else ["train and add"]
        kind = rng.choice(kinds)
        match kind:
            case "train and add":
                b = adapt(model, start, seed=change)
                bank.add("b", b.state)
                host.add("b", b)
            case "train and replace":  # on from where A and B are
                half = torch.tensor([0.0, 0.5, 0.5])
                mixed = [bank.blend(unit, ["a", "b"], half) for unit in model.units]
                blended = {key: t.detach() for tensors in mixed for key, t in tensors.items()}
                b = adapt(model, start | blended, seed=change)
                bank.add("b", b.state)
                host.replace("b", b)
            case "go back":
                if not done.get("train and replace"):
                    continue
                host.rollback("b")
                done["train and replace"] = 0
            case "remove":
                bank.remove("b")
                host.remove("b")
                done["train and replace"] = 0
        done[kind] = done.get(kind, 0) + 1
        if "b" in host.versions:
            host.predict(images, ["a", "b", "a", "b", "b"])
        assert all(torch.equal(now, then) for now, then in zip(logits(), before, strict=True)), kind
        assert host.versions["a"] == version
    assert done.keys() == {"train and add", "train and replace", "go back", "remove"}
    assert model.backbone.fingerprint() == fingerprint
