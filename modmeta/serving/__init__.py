"""Adapted models in use: a host of many domains, and files for other programs."""

from modmeta.serving.host import AdapterHost, Prediction, Version

__all__ = ["AdapterHost", "Prediction", "Version"]
