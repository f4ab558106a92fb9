"""A tiny learner whose sources are measured, and tasks that hide their query."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "learners"))  # for `import tiny`

import tiny

from modmeta.data import Episode
from modmeta.evaluation.systems import Task
from modmeta.learners import ModularMetaLearner
from modmeta.learners.measuring import episode_support


@pytest.fixture(scope="session")
def data() -> Any:
    made = tiny.digits(test_episodes=12)
    made.setup()
    return made


@pytest.fixture(scope="session")
def learner(data: Any) -> ModularMetaLearner:
    made = tiny.modular(veto=False).eval()
    with torch.no_grad():
        made.head.log_ridge.fill_(0.3)  # as if it had learned something
        for parameter in made.model.backbone.parameters():
            if float(parameter.abs().max()) < 1e-2:  # a bias of zero, or a branch that is closed
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) + 0.5)
    made.sources.measure(made.model.backbone, [chunk[:3] for chunk in data.source_images(5)], data.classes)
    return made


@pytest.fixture
def make_task(learner: ModularMetaLearner, data: Any) -> Callable[..., Task]:
    """Return the task of a test episode; a blind one has no query at all, an unlabelled one no labels."""

    def make(index: int = 0, *, blind: bool = False, labelled: bool = True, of: Any = None) -> Task:
        episode: Episode = data.episode("test", index)
        support = episode_support(episode, hide=False)
        support = support if labelled else replace(support, labels=None)
        if blind:
            kept = {name: value for name, value in vars(episode).items() if not name.startswith("query")}
            if not labelled:
                del kept["support_labels"]
            episode = cast(Episode, SimpleNamespace(**kept, query_ids=None))
        other = data.episode("test", index + 1)
        return Task(of or learner, episode, support, lambda: episode_support(other, hide=False))

    return make
