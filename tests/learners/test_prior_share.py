"""The unadapted model's share in the answer of an adapted one: in a learner, a file, a host and an export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from modmeta.adaptation import PRIOR, Adapted, LabelTrust, Support, Verdict, early_shift
from modmeta.adapters.adapter_file import read_adapter, write_adapter
from modmeta.data import DomainDataModule, Episode
from modmeta.errors import ModmetaError
from modmeta.evaluation.card import make_card
from modmeta.learners import ModularMetaLearner
from modmeta.learners.held_out import HeldOut
from modmeta.learners.measuring import episode_support
from modmeta.serving import AdapterHost
from modmeta.serving.export import export_adapter

SHARE = 0.3


@pytest.fixture(scope="module")
def learner(data: DomainDataModule) -> ModularMetaLearner:
    made = tiny.modular(prior_share=SHARE, head_options={"label_noise": 0.1}).eval()
    made.sources.measure(made.model.backbone, [c[:3] for c in data.source_images(3)], data.classes)
    made.veto = False
    return made


@pytest.fixture(scope="module")
def episode(data: DomainDataModule) -> Episode:
    return data.episode("test", 1)


@pytest.fixture(scope="module")
def adapted(learner: ModularMetaLearner, episode: Episode) -> Adapted:
    with torch.no_grad():
        return learner.adapt(episode_support(episode, hide=False))


@torch.no_grad()
def parts(learner: ModularMetaLearner, adapted: Adapted, support: Support, query: Tensor) -> tuple[Tensor, Tensor]:
    """Return query logits of the adapted model and of the unadapted one, each by a head fitted here."""
    own, same = (learner.features(images, adapted.state, adapted.plan) for images in (support.images, query))
    after = learner.fit_head(own, support, ridge=adapted.plan.ridge)(same)
    return after, learner.fit_head(learner.model.backbone(support.images), support)(learner.model.backbone(query))


def test_the_answer_is_the_weighted_mean_of_both_logits(
    learner: ModularMetaLearner, adapted: Adapted, episode: Episode
) -> None:
    after, before = parts(learner, adapted, episode_support(episode, hide=False), episode.query)
    assert not torch.allclose(after, before, atol=1e-2)
    found = learner.logits(adapted, episode.query)
    torch.testing.assert_close(found, (1 - SHARE) * after + SHARE * before, rtol=1e-4, atol=1e-5)


def test_without_labels_the_sources_classifiers_are_averaged(learner: ModularMetaLearner, episode: Episode) -> None:
    support = replace(episode_support(episode, hide=False), labels=None)
    with torch.no_grad():
        adapted = learner.adapt(support)
        after, before = parts(learner, adapted, support, episode.query)
        found = learner.logits(adapted, episode.query)
    torch.testing.assert_close(found, (1 - SHARE) * after + SHARE * before, rtol=1e-4, atol=1e-5)


def test_what_the_veto_measures_is_the_answer_as_it_will_be(
    learner: ModularMetaLearner, episode: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of the answer the prior's, no plan gains or loses anything."""
    monkeypatch.setattr(learner, "prior_share", 1.0)
    with torch.no_grad():
        trial = learner.trial(episode)
    assert trial.gains == pytest.approx(dict.fromkeys(trial.gains, 0.0), abs=1e-5)
    assert trial.evidence == pytest.approx(dict.fromkeys(trial.evidence, 0.0), abs=1e-5)
    assert set(trial.gains) == {"statistics", "plan/3", "plan"}


def test_where_nothing_is_adapted_there_is_nothing_to_share(
    learner: ModularMetaLearner, episode: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner, "veto", True)
    monkeypatch.setattr(learner, "veto_caution", 1e9)
    with torch.no_grad():
        kept = learner.adapt(episode_support(episode, hide=False))
    assert kept.report["verdict"]["choice"] == PRIOR
    assert (kept.prior, kept.report["unadapted_share"]) == (None, 1.0)


@pytest.mark.parametrize(("reach", "share"), [(0.99, SHARE), (1.01, 0.8)])
def test_in_a_near_domain_more_of_the_answer_is_the_unadapted_models(
    learner: ModularMetaLearner, episode: Episode, monkeypatch: pytest.MonkeyPatch, reach: float, share: float
) -> None:
    support = episode_support(episode, hide=False)
    with torch.no_grad():
        held_out = learner.held_out_logits(learner.model.backbone(support.images), support)
        loss = float(cross_entropy(held_out, support.labels))
        trial = learner.trial(episode)
        monkeypatch.setattr(learner, "near_loss", reach * loss)
        monkeypatch.setattr(learner, "near_share", 0.8)
        adapted = learner.adapt(support)
        after, before = parts(learner, adapted, support, episode.query)
        found = learner.logits(adapted, episode.query)
        assert learner.trial(episode) == trial
    torch.testing.assert_close(found, (1 - share) * after + share * before, rtol=1e-4, atol=1e-5)
    assert adapted.report["unadapted_loss"] == pytest.approx(loss, rel=1e-5)
    assert adapted.report["unadapted_share"] == share
    assert f"a share of {100 * share:.0f} %" in make_card(learner, support, adapted, 1.0)["decision"]


def test_images_that_look_wrong_do_not_say_whether_a_domain_is_near(
    learner: ModularMetaLearner, episode: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    support = episode_support(episode, hide=False)
    held_out = HeldOut(learner, support, learner.model.backbone(support.images).detach())
    losses = cross_entropy(held_out(None), support.labels, reduction="none")
    believed = losses < losses.median()
    assert held_out.unadapted_loss(believed) == pytest.approx(float(losses[believed].mean()))
    assert held_out.unadapted_loss(torch.zeros_like(believed)) == pytest.approx(float(losses.mean()))
    monkeypatch.setattr(learner, "veto", True)
    monkeypatch.setattr(learner, "wrong_labels", lambda *_: LabelTrust(0.5, 0.1, 0.0, believed, 1.0))
    with torch.no_grad():
        assert learner.adapt(support).report["unadapted_loss"] == pytest.approx(float(losses[believed].mean()))


@pytest.mark.parametrize(
    ("lacking", "reach", "share"), [(True, 1.01, 0.9), (True, 0.99, 0.8), (True, 0.0, 0.8), (False, 1.01, 0.8)]
)
def test_where_a_class_has_no_image_to_believe_in_the_images_say_whether_a_domain_is_near(
    learner: ModularMetaLearner,
    episode: Episode,
    monkeypatch: pytest.MonkeyPatch,
    lacking: bool,
    reach: float,
    share: float,
) -> None:
    support = episode_support(episode, hide=False)
    assert support.labels is not None
    believed = support.labels > 0 if lacking else torch.arange(len(support.labels)) > 0
    monkeypatch.setattr(learner, "near_shift", 1.0)  # from now on the situation holds what the backbone keeps
    with torch.no_grad():
        shift = early_shift(learner.situate(support))
    assert shift is not None
    options = {"near_shift": reach * shift, "lacking_share": 0.9, "near_loss": 1e9, "near_share": 0.8, "veto": True}
    for name, value in options.items():
        monkeypatch.setattr(learner, name, value)
    monkeypatch.setattr(learner, "wrong_labels", lambda *_: LabelTrust(0.1, 0.1, 1.0, believed, 1.0))
    monkeypatch.setattr(learner, "_judge", lambda *_: Verdict("plan", {}, {}, 0))
    with torch.no_grad():
        adapted = learner.adapt(support)
        after, before = parts(learner, adapted, support, episode.query)
        found = learner.logits(adapted, episode.query)
    assert adapted.report["unadapted_share"] == share
    torch.testing.assert_close(found, (1 - share) * after + share * before, rtol=1e-4, atol=1e-5)


def test_where_nothing_is_known_of_the_gain_the_share_stands(
    learner: ModularMetaLearner, episode: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner, "near_loss", 1e9)
    with torch.no_grad():
        adapted = learner.adapt(replace(episode_support(episode, hide=False), labels=None))
    assert adapted.prior is not None
    assert (adapted.report["unadapted_loss"], adapted.report["unadapted_share"]) == (None, SHARE)


def test_the_share_takes_part_in_training(learner: ModularMetaLearner, data: DomainDataModule) -> None:
    losses = {}
    for share in (0.0, SHARE, 1.0):
        own = tiny.modular(prior_share=share).eval()
        own.sources.load_state_dict(learner.sources.state_dict())
        losses[share] = float(own.episode_loss(data.episode("train", 0)).detach())
    assert len(set(losses.values())) == 3


def test_the_card_says_so(learner: ModularMetaLearner, adapted: Adapted, episode: Episode) -> None:
    support = episode_support(episode, hide=False)
    for one, said in ((adapted, True), (replace(adapted, prior=None), False)):
        assert ("second forward pass" in make_card(learner, support, one, 1.0)["decision"]) is said


def test_file_and_host_give_the_same_answer(
    learner: ModularMetaLearner, adapted: Adapted, episode: Episode, tmp_path: Path
) -> None:
    expected = learner.logits(adapted, episode.query).detach()
    path = tmp_path / "neon.safetensors"
    write_adapter(path, learner.model, adapted.to_file({}))
    with torch.no_grad():
        again = Adapted.from_file(read_adapter(path, learner.model))
        assert torch.equal(learner.logits(again, episode.query), expected)
    host = AdapterHost(learner.model)
    host.load("neon", path)
    host.add("same", adapted)
    for domain in ("neon", "same"):
        answers = torch.stack([each.logits for each in host.predict(episode.query, domain)])
        torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_lacks_the_priors_part_is_not_written(
    learner: ModularMetaLearner, adapted: Adapted, tmp_path: Path
) -> None:
    content = adapted.to_file({})
    for name in ("prior.weight", "prior.scale"):
        rest = {key: tensor for key, tensor in content.classifier.items() if key != name}
        with pytest.raises(ModmetaError, match=f"head:{name}' is missing"):
            write_adapter(tmp_path / "a.safetensors", learner.model, replace(content, classifier=rest))
    with pytest.raises(ModmetaError, match="both true or false"):
        Adapted.from_file(replace(content, head={**content.head, "prior.normalize": 1}))


def test_graphs_hold_both_networks_and_a_state_dict_cannot(
    learner: ModularMetaLearner, adapted: Adapted, episode: Episode, tmp_path: Path
) -> None:
    content = adapted.to_file({})

    def live(images: Tensor) -> Tensor:
        return learner.logits(adapted, images)

    assert export_adapter(learner.model, content, tmp_path / "m.pt2", "torch_export", live).difference <= 1e-4
    with pytest.raises(ModmetaError, match="prior_share"):
        export_adapter(learner.model, content, tmp_path / "m.safetensors", "state_dict", live)


@pytest.mark.parametrize("option", ["prior_share", "near_share", "lacking_share"])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_that_make_no_sense_are_refused(option: str, share: float) -> None:
    with pytest.raises(ModmetaError, match=rf"{option} must lie in 0\.\.1"):
        tiny.modular(**{option: share})
