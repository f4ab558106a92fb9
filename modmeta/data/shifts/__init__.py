"""Simulated domain shifts: families of image changes with a strength."""

from modmeta.data.shifts import blur, color, geometry, noise, texture
from modmeta.data.shifts.registry import SHIFTS, apply_shift, register_shift

__all__ = ("SHIFTS", "apply_shift", "blur", "color", "geometry", "noise", "register_shift", "texture")
