"""Specialists of the source domains: what steps on many images of each come to, in a checkpoint's bank.

    python benchmarks/specialists.py --root PACS --checkpoints sketch=SKETCH.ckpt ... --output runs/flute
    python -m modmeta compare --config configs/compare/pacs_flute.yaml --data.root PACS

For every source domain of a checkpoint, its learning units take steps of the inner loop on ``--images`` images of each
class, under the loss that an adaptation descends and with the domain hidden from all that is known of the sources.
The first images of a class in the source's seeded order are taken, so nothing is random. What is written to
``OUTPUT/DOMAIN.ckpt`` is the checkpoint with these specialists; the file that was given stays as it is. A policy that
was trained without specialists starts from little of them; with ``--prior -3`` it starts from them nearly alone, as in
``configs/compare/pacs_specialists.yaml``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from modmeta.adaptation import Support, inner_loop
from modmeta.adapters import State
from modmeta.commands.quiet import quiet
from modmeta.data import DomainDataModule
from modmeta.learners import ModularMetaLearner, load_learner, read_checkpoint
from modmeta.learners.checkpoint_io import AtomicCheckpointIO

_PRIOR = 3  # which of the policy's outputs for a unit weighs the prior against the specialists


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="DOMAIN=CKPT")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--images", type=int, default=20, help="per class of a source domain")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rate", type=float, default=0.003, help="root mean square size of a step")
    parser.add_argument("--prior", type=float, help="log-weight of the universal prior in the policy's start")
    parser.add_argument("--cache_dir", type=Path)
    options = parser.parse_args()
    quiet()
    for each in options.checkpoints:
        held_out, _, path = each.partition("=")
        learner = load_learner(path)
        assert isinstance(learner, ModularMetaLearner)
        size = learner.model.backbone.image_size
        data = DomainDataModule(options.root, test_domains=[held_out], image_size=size, cache_dir=options.cache_dir)
        data.setup()
        for domain, (images, labels) in images_by_domain(data, options.images).items():
            support = Support(images, labels, tuple(data.classes), hidden=domain)
            state, losses = specialist(learner, support, options.steps, options.rate)
            learner.bank.add(domain, state, learner.prior_features(images).mean(0))
            print(f"{held_out} held out: specialist of {domain}, loss {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
        checkpoint = read_checkpoint(path)
        checkpoint["state_dict"]["bank._extra_state"] = learner.bank.get_extra_state()
        if options.prior is not None:
            checkpoint["state_dict"]["policy.per_unit.bias"][_PRIOR] = options.prior
        AtomicCheckpointIO().save_checkpoint(checkpoint, options.output / f"{held_out}.ckpt")


def images_by_domain(data: DomainDataModule, per_class: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return images ``(N, 3, H, W)`` and labels ``(N,)`` of every source domain."""
    chunks = defaultdict(list)
    for domain, images, labels, _ in data.source_images(per_class):
        chunks[domain].append((images, labels))
    return {d: (torch.cat([x for x, _ in own]), torch.cat([y for _, y in own])) for d, own in chunks.items()}


def specialist(learner: ModularMetaLearner, support: Support, steps: int, rate: float) -> tuple[State, list[float]]:
    """Return what steps on all learning units, whole, come to, and the loss before each."""
    plan = learner.idle_plan()
    learning = torch.tensor([float(unit.learns) for unit in learner.model.units])
    plan = replace(plan, gates=learning, rates=rate * learning[:, None].expand(-1, steps))
    initial = {name: tensor.detach() for name, tensor in learner.bank.initial().items()}

    def loss(features: Tensor) -> Tensor:
        return learner.inner_loss(features, support).mean()

    return inner_loop(learner.model, initial, plan, support.images, loss, statistics=initial)


if __name__ == "__main__":
    main()
