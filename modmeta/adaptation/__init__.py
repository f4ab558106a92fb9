"""From a support set to an adapted model: heads, indicators, policy, inner loop, veto."""

from modmeta.adaptation.cost import backward_macs, backward_shares
from modmeta.adaptation.gradients import support_gradients
from modmeta.adaptation.heads import HEADS, Anchor, Classifier, Head, Labelled, register_head
from modmeta.adaptation.indicators import (
    DEFAULT_INDICATORS,
    INDICATORS,
    IndicatorSet,
    Situation,
    register_indicator,
)
from modmeta.adaptation.inner_loop import DivergedError, inner_loop, read_statistics
from modmeta.adaptation.plan import Plan
from modmeta.adaptation.policy import Policy
from modmeta.adaptation.sources import SourceStatistics, SourceView, norm_sites, observe_norms, running_statistics
from modmeta.adaptation.support import Adapted, Support
from modmeta.adaptation.update_rules import UPDATE_RULES, UpdateRule
from modmeta.adaptation.veto import PRIOR, Verdict, candidates, judge, stratified_folds, tempered_losses

__all__ = [
    "DEFAULT_INDICATORS",
    "HEADS",
    "INDICATORS",
    "PRIOR",
    "UPDATE_RULES",
    "Adapted",
    "Anchor",
    "Classifier",
    "DivergedError",
    "Head",
    "IndicatorSet",
    "Labelled",
    "Plan",
    "Policy",
    "Situation",
    "SourceStatistics",
    "SourceView",
    "Support",
    "UpdateRule",
    "Verdict",
    "backward_macs",
    "backward_shares",
    "candidates",
    "inner_loop",
    "judge",
    "norm_sites",
    "observe_norms",
    "read_statistics",
    "register_head",
    "register_indicator",
    "running_statistics",
    "stratified_folds",
    "support_gradients",
    "tempered_losses",
]
