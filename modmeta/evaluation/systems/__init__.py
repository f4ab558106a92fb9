"""Systems to compare: the learner of a checkpoint and its rivals, each registered by name."""

from modmeta.evaluation.systems.auto_rgn import AutoRGN
from modmeta.evaluation.systems.closed_form import HeadSystem
from modmeta.evaluation.systems.fine_tune import FineTune, LinearProbe, ProbeThenFineTune
from modmeta.evaluation.systems.flute import Flute
from modmeta.evaluation.systems.learned import LearnerSystem
from modmeta.evaluation.systems.selective import Constant, RandomGates, SparseUpdate
from modmeta.evaluation.systems.source import Aligned, Source
from modmeta.evaluation.systems.statistics import HandRule, Statistics
from modmeta.evaluation.systems.system import SYSTEMS, Outcome, System, Task, register_system
from modmeta.evaluation.systems.tiny_train import TinyTrain
from modmeta.evaluation.systems.unlabelled import InformationMaximisation, Tent

__all__ = [
    "SYSTEMS",
    "Aligned",
    "AutoRGN",
    "Constant",
    "FineTune",
    "Flute",
    "HandRule",
    "HeadSystem",
    "InformationMaximisation",
    "LearnerSystem",
    "LinearProbe",
    "Outcome",
    "ProbeThenFineTune",
    "RandomGates",
    "Source",
    "SparseUpdate",
    "Statistics",
    "System",
    "Task",
    "Tent",
    "TinyTrain",
    "register_system",
]
