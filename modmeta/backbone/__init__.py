"""One frozen timm model: its sites, its forward pass under an overlay, its cuts and its fingerprint."""

from modmeta.backbone.attention import second_order_safe
from modmeta.backbone.backbone import Backbone
from modmeta.backbone.cut import Cut
from modmeta.backbone.moments import channel_moments
from modmeta.backbone.shell import Rerun
from modmeta.backbone.site import KINDS, Selector, Site

__all__ = ["KINDS", "Backbone", "Cut", "Rerun", "Selector", "Site", "channel_moments", "second_order_safe"]
