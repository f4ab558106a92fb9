"""Zero-shot learning: from a configuration to figures, checkpoints, and what makes no sense."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from textbook import assert_resumes, same, tensors

import modmeta
from modmeta.adaptation import Adapted, Support, bilinear
from modmeta.cli import main
from modmeta.data import DomainDataModule, read_attributes
from modmeta.errors import ModmetaError
from modmeta.learners import ZeroShotLearner, load_learner

CONFIG = Path(modmeta.__file__).parents[1] / "configs/learners/attribute.yaml"
NEW = {"3", "6", "9"}


def zero_shot(**changes: Any) -> ZeroShotLearner:
    torch.manual_seed(0)
    return ZeroShotLearner(**({"backbone": tiny.BACKBONE, "attributes": "digits", "source_images": 4} | changes))


def digits(**changes: Any) -> DomainDataModule:
    options: dict[str, Any] = {
        "ways": None, "test_domains": ["ink"], "test_classes": sorted(NEW), "test_seen_classes": True,
        "eval_shots": [0, 2], "test_episodes": 2,
        "shift_share": 1.0,  # features of shifted images are computed many at a time
    }  # fmt: skip
    return tiny.digits(**(options | changes))


@pytest.fixture
def _fixed_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare fits whose accuracy nobody looks at the choice of the closed form's strengths."""
    monkeypatch.setattr(bilinear, "_FEATURE_RIDGES", (1e-2,))
    monkeypatch.setattr(bilinear, "_ATTRIBUTE_RIDGES", (1e-1,))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fit and test from the configuration, with less training and in an easier style."""
    folder = tmp_path_factory.mktemp("attribute")
    words = {
        "model.init_args.source.epochs": 4, "trainer.max_epochs": 5, "data.steps_per_epoch": 15,
        "data.test_episodes": 10, "data.batch_size": 32, "model.init_args.source_images": 20, "data.shots": 2,
        "data.eval_shots": "[0, 2]", "data.test_domains": "[ink]", "data.shift_share": 1.0,
        "trainer.enable_progress_bar": "false",
        "trainer.limit_val_batches": 0,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        assert main(["fit", "--config", str(CONFIG), *flags]) == 0
    return folder / "runs/attribute/version_0"


def records(run: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    return {(r["system"], r["shots"], r["metric"]): r for r in json.loads((run / "results.json").read_text())}


def test_digits_that_were_never_seen_are_told_apart_by_their_attributes(run: Path) -> None:
    found = records(run)
    assert found["adapted", 0, "unseen_accuracy"]["low"] > 0.1  # chance, among ten classes
    assert found["source", 0, "unseen_accuracy"]["value"] == 0.0
    assert found["adapted", 2, "harmonic_mean"]["low"] > found["adapted", 0, "harmonic_mean"]["high"]


def test_the_records_are_those_of_every_learner_and_three_more(run: Path) -> None:
    found = records(run)
    keys = {"system", "domain", "shots", "ways", "metric", "value", "low", "high", "episodes"}
    assert all(set(record) == keys for record in found.values())
    for system, shots in (("source", 0), ("none", 0), ("adapted", 0), ("ridge", 2), ("adapted", 2)):
        for metric in ("accuracy", "nll", "ece", "seen_accuracy", "unseen_accuracy", "harmonic_mean"):
            record = found[system, shots, metric]
            assert (record["domain"], record["ways"], record["episodes"]) == ("ink", 10, 10)
        s, u = (found[system, shots, f"{side}_accuracy"]["value"] for side in ("seen", "unseen"))
        assert found[system, shots, "harmonic_mean"]["value"] == pytest.approx(2 * s * u / (s + u) if s + u else 0.0)
        # Seven classes were seen and three were not, with as many images each.
        assert found[system, shots, "accuracy"]["value"] == pytest.approx(0.7 * s + 0.3 * u)
    assert ("ridge", 0, "accuracy") not in found


def test_a_checkpoint_needs_no_file_beside_it_and_knows_new_classes(run: Path) -> None:
    learner = load_learner(run / "checkpoints/last.ckpt")
    assert isinstance(learner, ZeroShotLearner)
    assert NEW.isdisjoint(learner.compatibility.classes)
    data = digits()
    data.setup("test")
    episode = data.episode("test", 0)
    support = Support(episode.support, episode.support_labels, episode.classes)
    with torch.no_grad():
        adapted = learner.adapt(support)
        logits = learner.logits(adapted, episode.query)
        again = Adapted.from_file(adapted.to_file({}))
        assert torch.equal(learner.logits(again, episode.query), logits)
        # Fewer candidates: the same scores for those that are left.
        some = learner.adapt(replace(support, classes=("9", "1")))
        torch.testing.assert_close(learner.logits(some, episode.query), logits[:, [9, 1]])
        # A class that nobody thought of at the time of the fit, by a row of attributes.
        known = learner.attributes
        assert known is not None
        values = torch.cat([known.of("9"), known.values[1:]])
        learner.attributes = replace(known, classes=("nine", *known.classes[1:]), values=values)
        some = learner.adapt(replace(support, classes=("nine", "1")))
        torch.testing.assert_close(learner.logits(some, episode.query), logits[:, [9, 1]])


def test_images_without_labels_centre_the_classifier(run: Path) -> None:
    learner = load_learner(run / "checkpoints/last.ckpt")
    data = digits()
    data.setup("test")
    episode = data.episode("test", 1)
    support = Support(episode.support, None, episode.classes)
    with torch.no_grad():
        classifier = learner.adapt(support).classifier
        features = learner.model.backbone(episode.support)
    torch.testing.assert_close(classifier.center, features.mean(0))  # type: ignore[attr-defined]


def test_a_file_of_other_attributes_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = read_attributes("digits")
    lines = [f"{name},{row[0]}" for name, row in zip(known.classes, known.values.tolist(), strict=True)]
    Path("other.csv").write_text("\n".join(["class,holes", *lines]))
    words = ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--model.init_args.attributes", "other.csv"]
    assert main(["test", *words]) == 2
    assert "the checkpoint is for other attributes: it has top, upper_right" in capsys.readouterr().err


@pytest.mark.usefixtures("_fixed_strengths")
def test_training_hides_the_domain_and_a_fold_of_the_classes(tmp_path: Path) -> None:
    learner, data = zero_shot(), digits()
    tiny.trainer(tmp_path, 1).fit(learner, datamodule=data)
    episode = data.episode("train", 3)
    asked, anchor = [], learner.compatibility.anchor

    def spy(*arguments: Any) -> Any:
        asked.append(arguments[2:])
        return anchor(*arguments)

    learner.compatibility.anchor = spy  # type: ignore[method-assign]
    learner.episode_loss(episode).backward()
    assert asked == [(episode.domain, episode.index % 4, True)]
    moved = {name for name, p in learner.named_parameters() if p.grad is not None and p.grad != 0}
    assert moved == {"head.log_scale", "head.log_ridge", "head.log_fade"}


@pytest.mark.usefixtures("_fixed_strengths")
def test_a_fit_that_is_resumed_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    assert_resumes(zero_shot, digits, tmp_path)


@pytest.mark.usefixtures("_fixed_strengths")
def test_a_checkpoint_brings_back_the_closed_form(tmp_path: Path) -> None:
    learner, data = zero_shot(), digits()
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(learner, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_learner(tmp_path / "last.ckpt")
    assert isinstance(again, ZeroShotLearner)
    assert same(tensors(again), tensors(learner))
    for name in ("plain", "aligned", "penalties", "scale"):
        assert torch.equal(getattr(again.compatibility, name), getattr(learner.compatibility, name))


def test_what_makes_no_sense_is_refused_before_any_work(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 1)
    with pytest.raises(ModmetaError, match="name a CSV file with the attributes of every class"):
        trainer.fit(zero_shot(attributes=None), datamodule=digits())
    short = tmp_path / "short.csv"
    short.write_text("class,holes\n" + "\n".join(f"{digit},{digit % 3}" for digit in range(9)))
    with pytest.raises(ModmetaError, match="unknown class '9' in the attributes"):
        trainer.fit(zero_shot(attributes=str(short)), datamodule=digits())
    with pytest.raises(ModmetaError, match=r"eval_shots=\[0, 2\]: a MetaLearner needs images of every class"):
        trainer.fit(tiny.head_only(), datamodule=digits())
    with pytest.raises(ModmetaError, match="head 'attribute' needs class attributes; take it with a ZeroShotLearner"):
        tiny.head_only(head="attribute")
    with pytest.raises(ModmetaError, match="was not trained"):
        zero_shot().adapt(Support(torch.zeros(2, 3, 32, 32), torch.arange(2), ("1", "2")))
