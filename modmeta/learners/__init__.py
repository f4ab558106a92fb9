"""LightningModules that meta-train something over episodes."""

from modmeta.learners.alignment import ALIGNMENTS, AlignmentConfig
from modmeta.learners.amortized import AmortizedLearner
from modmeta.learners.base import MetaLearner
from modmeta.learners.checkpoint_io import AtomicCheckpointIO
from modmeta.learners.cosine_decay import CosineDecay
from modmeta.learners.gradient import GradientLearner
from modmeta.learners.loading import load_learner, read_checkpoint
from modmeta.learners.memory import MemoryLearner
from modmeta.learners.metric import MetricLearner
from modmeta.learners.metrics import EpisodeMetrics, Result
from modmeta.learners.modular import ModularMetaLearner
from modmeta.learners.reptile import ReptileLearner
from modmeta.learners.source import BackboneConfig, SourceConfig, SourceLearner
from modmeta.learners.supernet import SupernetLearner
from modmeta.learners.zero_shot import ZeroShotLearner

__all__ = [
    "ALIGNMENTS",
    "AlignmentConfig",
    "AmortizedLearner",
    "AtomicCheckpointIO",
    "BackboneConfig",
    "CosineDecay",
    "EpisodeMetrics",
    "GradientLearner",
    "MemoryLearner",
    "MetaLearner",
    "MetricLearner",
    "ModularMetaLearner",
    "ReptileLearner",
    "Result",
    "SourceConfig",
    "SourceLearner",
    "SupernetLearner",
    "ZeroShotLearner",
    "load_learner",
    "read_checkpoint",
]
