"""Checking a folder of images before anything is learned from it."""

from modmeta.data.audit.audit import Audit, examine
from modmeta.data.audit.balance import Balance, count_images
from modmeta.data.audit.findings import Finding, find_problems
from modmeta.data.audit.manifest import manifest_lines
from modmeta.data.audit.page import render_page
from modmeta.data.audit.summary import summarise
from modmeta.data.audit.survey import Survey, take_survey
from modmeta.data.audit.thumbnails import thumbnail

__all__ = (
    "Audit",
    "Balance",
    "Finding",
    "Survey",
    "count_images",
    "examine",
    "find_problems",
    "manifest_lines",
    "render_page",
    "summarise",
    "take_survey",
    "thumbnail",
)
