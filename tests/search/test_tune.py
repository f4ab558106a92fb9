import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna")

from modmeta.cli import main

SPACE = {
    "model.init_args.units.0.rate": {"low": 0.001, "high": 0.1, "log": True},
    "model.init_args.steps": {"low": 1, "high": 2},
    "model.init_args.head": ["ridge", "prototype"],
}
KILLER = """
import os
import shutil
import signal

from modmeta.learners import SupernetLearner


class Killed(SupernetLearner):
    def query_loss(self, logits, labels):
        if self.current_epoch == 1 and "KILL_ME" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().query_loss(logits, labels)
"""


def tune(config: Path, output: str, trials: int = 2, space: Any = SPACE, words: tuple[str, ...] = ()) -> int:
    Path("space.yaml").write_text(yaml.safe_dump(space))
    words = ("--config", str(config), "--space", "space.yaml", "--trials", str(trials), "--output", output, *words)
    return main(["tune", *words])


def trials(output: Path) -> list[dict[str, Any]]:
    return [{**t, "seconds": 0} for t in json.loads((output / "trials.json").read_text())["trials"]]


@pytest.fixture(scope="module")
def study(supernet_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a study of two trials."""
    config = yaml.safe_load(supernet_config.read_text())
    config["modules"], config["model"]["class_path"] = ["killer.py"], "killer.Killed"
    config["trainer"]["max_epochs"] = 2
    folder = tmp_path_factory.mktemp("study")
    with chdir(folder):
        Path("killer.py").write_text(KILLER)
        Path("fit.yaml").write_text(yaml.safe_dump(config))
        assert tune(Path("fit.yaml"), "whole") == 0
    return folder


def test_the_best_configuration_is_one_that_fit_takes(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = trials(study / "whole")
    assert len(done) == 2
    best = max(done, key=lambda trial: trial["result"])
    words = ["fit", "--config", str(study / "whole/best.yaml")]
    assert main([*words, "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert settings["units"][0]["rate"] == best["values"]["model.init_args.units.0.rate"]
    assert settings["steps"] == best["values"]["model.init_args.steps"]
    assert settings["head"] == best["values"]["model.init_args.head"]
    assert main([*words, "--trainer.fast_dev_run", "true"]) == 0


def test_a_trial_is_what_fit_and_validate_say(study: Path) -> None:
    folder = study / "whole/trials/0000/version_0"
    assert main(["validate", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--name", "again"]) == 0
    records = json.loads(Path("runs/again/version_0/results.json").read_text())
    gains = [r["value"] for r in records if r["system"] == "adapted" and r["metric"] == "gain"]
    assert trials(study / "whole")[0]["result"] == pytest.approx(sum(gains) / len(gains), abs=1e-6)
    assert {r["domain"] for r in records} == {"slanted"}, "which is for validation"


def test_a_study_that_was_killed_ends_as_one_that_was_not(study: Path) -> None:
    with chdir(study):
        words = ["tune", "--config", "fit.yaml", "--space", "space.yaml", "--trials", "2", "--output", "parts"]
        command, kill = [sys.executable, "-m", "modmeta", *words], {"KILL_ME": "1"}
        done = subprocess.run(command, env={**os.environ, **kill}, capture_output=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not Path("parts/trials.json").exists()
        assert tune(Path("fit.yaml"), "parts", 2) == 0
        assert trials(Path("parts")) == trials(Path("whole"))
        assert Path("parts/best.yaml").read_bytes() == Path("whole/best.yaml").read_bytes()
        folders = [path.name for path in Path("parts/trials/0000").iterdir() if path.is_dir()]
        assert folders == ["version_0"], "the trial that was killed went on"


def test_a_study_that_was_killed_between_its_files(study: Path) -> None:
    """Behind the last step of a trial, before its result was kept; and behind that, before the best was."""
    with chdir(study):
        shutil.copytree("whole", "late")
        Path("late/trials.json").unlink()
        assert tune(Path("fit.yaml"), "late", 1) == 0
        assert trials(Path("late")) == trials(Path("whole"))[:1]
        shutil.copy("whole/trials.json", "late/trials.json")
        assert tune(Path("fit.yaml"), "late", 2) == 0
        assert Path("late/best.yaml").read_bytes() == Path("whole/best.yaml").read_bytes()


def test_what_fails_counts_and_does_not_stop_the_study(
    supernet_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"data.ways": [3, 999]}
    assert tune(supernet_config, "study", 3, space) == 0
    done = trials(Path("study"))
    assert {trial["result"] is None for trial in done} == {True, False}
    assert all((trial["values"]["data.ways"] == 999) == (trial["result"] is None) for trial in done)
    assert all("999" in trial["reason"] and "\n" not in trial["reason"] for trial in done if trial["result"] is None)
    assert "failed" in capsys.readouterr().out


def test_a_study_in_which_all_fail(supernet_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(supernet_config, "study", 2, {"model.init_args.at_once": [0, -1]}) == 2
    assert "all 2 trials failed; the first: at_once must be 1 or more" in capsys.readouterr().err
    assert not Path("study/best.yaml").exists()


@pytest.mark.parametrize(
    ("space", "words", "message"),
    [
        ({"model.init_args.units.0.rat": [1, 2]}, (), "did you mean 'model.init_args.units.0.rate'?"),
        ({"model.init_args.steps": {"low": 0.5, "high": 2.0}}, (), "model.init_args.steps"),
        (SPACE, ("--metric", "test/gain"), "settings are chosen on validation"),
        (SPACE, ("--seed", "-1"), "--seed -1 is too small"),
        (SPACE, ("--metrik", "val/gain"), "did you mean --metric?"),
    ],
)
def test_what_is_refused_before_the_first_trial(
    supernet_config: Path, space: dict, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(supernet_config, "study", 2, space, words) == 2
    assert message in capsys.readouterr().err
    assert not Path("study").exists()


def test_a_metric_that_is_not_logged_stops_the_study(supernet_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(supernet_config, "study", 2, words=("--metric", "val/gian")) == 2
    assert "unknown metric 'val/gian'; did you mean 'val/gain'?" in capsys.readouterr().err
    assert not Path("study/trials.json").exists()
