"""Interpolations in a configuration: they name its other keys, and nothing outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from modmeta.errors import ModmetaError


@contextmanager
def without_environment() -> Iterator[None]:
    """Refuse ``${oc.env:NAME}`` within.

    A run's folder holds its resolved configuration: a configuration of somebody else could carry a secret into it.
    """
    OmegaConf.register_resolver("oc.env", _refuse, replace=True, annotation_validation="off")
    try:
        yield
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True, annotation_validation="off")


def _refuse(*words: object) -> NoReturn:
    raise ModmetaError("a configuration may not read the environment (oc.env); give the value as an option")
