"""From a support set to an adapted model: heads, indicators, policy, inner loop, veto."""

from modmeta.adaptation.attribute_head import AttributeHead
from modmeta.adaptation.comparisons import (
    COMPARISONS,
    PAIR_LOSSES,
    Compared,
    Comparison,
    register_comparison,
    register_pair_loss,
)
from modmeta.adaptation.compatibility import Compatibility
from modmeta.adaptation.cost import backward_macs, backward_shares
from modmeta.adaptation.descent import STEP_RULES, StepRule, descend
from modmeta.adaptation.gradients import support_gradients
from modmeta.adaptation.heads import HEADS, Anchor, Classifier, Head, Labelled, register_head
from modmeta.adaptation.indicators import (
    DEFAULT_INDICATORS,
    INDICATORS,
    IndicatorSet,
    Situation,
    early_shift,
    register_indicator,
)
from modmeta.adaptation.inner_loop import DivergedError, inner_loop, read_statistics
from modmeta.adaptation.label_trust import LabelTrust, label_trust
from modmeta.adaptation.plan import Plan
from modmeta.adaptation.policy import Policy
from modmeta.adaptation.ridge_heads import AnchoredRidgeHead, RidgeHead
from modmeta.adaptation.signals import SIGNALS, Signal, SignalConfig, SignalMixture, register_signal
from modmeta.adaptation.sources import SourceStatistics, SourceView, norm_sites, observe_norms, running_statistics
from modmeta.adaptation.statistics_tuning import read_beyond, reading_units, refuse_tuning, tune_statistics
from modmeta.adaptation.support import Adapted, Support
from modmeta.adaptation.track_record import TrackRecord, Trial
from modmeta.adaptation.update_rules import UPDATE_RULES, UpdateRule
from modmeta.adaptation.veto import PRIOR, Verdict, candidates, judge, measure, stratified_folds, tempered_losses

__all__ = [
    "COMPARISONS",
    "DEFAULT_INDICATORS",
    "HEADS",
    "INDICATORS",
    "PAIR_LOSSES",
    "PRIOR",
    "SIGNALS",
    "STEP_RULES",
    "UPDATE_RULES",
    "Adapted",
    "Anchor",
    "AnchoredRidgeHead",
    "AttributeHead",
    "Classifier",
    "Compared",
    "Comparison",
    "Compatibility",
    "DivergedError",
    "Head",
    "IndicatorSet",
    "LabelTrust",
    "Labelled",
    "Plan",
    "Policy",
    "RidgeHead",
    "Signal",
    "SignalConfig",
    "SignalMixture",
    "Situation",
    "SourceStatistics",
    "SourceView",
    "StepRule",
    "Support",
    "TrackRecord",
    "Trial",
    "UpdateRule",
    "Verdict",
    "backward_macs",
    "backward_shares",
    "candidates",
    "descend",
    "early_shift",
    "inner_loop",
    "judge",
    "label_trust",
    "measure",
    "norm_sites",
    "observe_norms",
    "read_beyond",
    "read_statistics",
    "reading_units",
    "refuse_tuning",
    "register_comparison",
    "register_head",
    "register_indicator",
    "register_pair_loss",
    "register_signal",
    "running_statistics",
    "stratified_folds",
    "support_gradients",
    "tempered_losses",
    "tune_statistics",
]
