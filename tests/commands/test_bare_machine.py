"""A machine without network, without a home, with the C locale, and with paths of spaces and other alphabets."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image


def run(folder: Path, *words: str) -> str:
    environment = {
        "PATH": os.environ["PATH"], "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "LANG": "C", "LC_ALL": "C",
        "HOME": "/dev/null/home",  # nobody can write there, root no more than others
        **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9"),
    }  # fmt: skip
    words = (sys.executable, "-m", "modmeta", *words)
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return done.stdout.decode()


@pytest.mark.fault(42)
def test_modules_and_fit_need_no_home_network_or_ascii(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ein Ordner mit Ümlauten ☃"
    generator = np.random.default_rng(0)
    for domain in ("Tag", "Dämmerung", "夜"):
        for name in ("Kätzchen", "big dog"):
            (folder / "Bilder ж" / domain / name).mkdir(parents=True)
            for number in range(3):
                pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "Bilder ж" / domain / name / f"é {number}.png")
    content = yaml.safe_load(tiny_config.read_text())
    content["trainer"]["max_epochs"] = 2
    content["data"] |= {
        "root": "Bilder ж", "test_domains": ["夜"], "val_domains": ["Dämmerung"], "ways": 2, "shots": 1,
        "eval_shots": [1], "queries": 1, "steps_per_epoch": 1, "batch_size": 4, "cache_dir": "Zwischen speicher",
    }  # fmt: skip
    (folder / "Läufe.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    assert "film" in run(folder, "modules")
    assert "夜" in run(folder, "fit", "--config", "Läufe.yaml", "--test_after_fit", "true")
    assert (folder / "runs" / "Läufe" / "version_0" / "results.json").is_file()
