"""Signals: inner losses that need no labels, alone or beside the labels' own."""

from modmeta.adaptation.signals import (  # noqa: F401 - they register themselves
    consistency,
    entropy,
    information_maximisation,
    rotation,
)
from modmeta.adaptation.signals.information_maximisation import information_loss
from modmeta.adaptation.signals.signal import SIGNALS, Seen, Signal, SignalConfig, SignalMixture, register_signal

__all__ = [
    "SIGNALS",
    "Seen",
    "Signal",
    "SignalConfig",
    "SignalMixture",
    "information_loss",
    "register_signal",
]
