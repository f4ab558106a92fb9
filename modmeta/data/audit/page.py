"""The report as one self-contained page: no scripts, no network, every name escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from modmeta.data.audit.audit import Audit
from modmeta.data.audit.balance import Balance
from modmeta.data.audit.duplicates import Group
from modmeta.data.audit.findings import Finding
from modmeta.data.decode import printable

MAX_CASES = 500  # lines of one kind that the page lists; the manifest has all
MAX_GROUPS = 24  # groups of duplicates that are shown in pictures
MAX_MEMBERS = 6

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; overflow-wrap: anywhere }}
td:first-child, th:first-child {{ text-align: left }}
figure {{ display: inline-block; width: 8rem; margin: .3rem; vertical-align: top; font-size: 12px;
  overflow-wrap: anywhere }}
.group {{ border-left: 4px solid #bbb; margin: .6rem 0; padding-left: .4rem }}
.error {{ color: #a00 }} .warning {{ color: #860 }} .zero {{ background: #fdd }}
</style>
</head>
<body>
"""

Picture = Callable[[int], str]


def render_page(audit: Audit, counts: Balance, found: Sequence[Finding], suspects: int, picture: Picture) -> str:
    """Return the report.

    Args:
        audit: what is known of the folder.
        counts: its images.
        found: its problems.
        suspects: how many suspicious labels to show at most.
        picture: gives the data URI of an inspection's image.
    """
    survey = audit.survey
    title = "check of " + _text(survey.folder.resolve().name)
    bad = len(survey.inspections) - len(survey.good)
    clean = all(finding.severity != "error" for finding in found)
    parts = [
        _HEAD.format(title=title),
        f"<h1>{title}</h1>",
        f"<p>{len(survey.inspections):,} image files, {len(survey.good):,} good, {bad:,} quarantined; "
        f"{'no errors' if clean else '<b class=error>with errors</b>'}.</p>",
        _balance(counts),
        *_suspects(audit, audit.suspects()[:suspects], picture),
        *_groups("Same pixels under two labels", audit, audit.conflicting(audit.copies), picture),
        *_groups("Nearly the same under two labels", audit, audit.conflicting(audit.near), picture),
        *_groups("Nearly the same under one label", audit, _agreeing(audit, audit.near), picture),
        *(part for finding in found for part in _finding(finding)),
        "</body>\n</html>",
    ]
    return "\n".join(parts) + "\n"


def _balance(counts: Balance) -> str:
    rows = []
    for name in counts.classes:
        numbers = [counts.counts[domain, name] for domain in counts.domains]
        cells = "".join(f"<td{'' if number else ' class=zero'}>{number:,}</td>" for number in numbers)
        rows.append(f"<tr><td>{_text(name)}</td>{cells}<td>{sum(numbers):,}</td></tr>")
    sums = [sum(counts.of_domain(domain).values()) for domain in counts.domains]
    rows.append(f"<tr><th>all</th>{''.join(f'<th>{number:,}</th>' for number in sums)}<th>{sum(sums):,}</th></tr>")
    heads = "".join(f"<th>{_text(domain)}</th>" for domain in counts.domains)
    return f"<h2>Good images</h2>\n<table><tr><th>class</th>{heads}<th>all</th></tr>\n{chr(10).join(rows)}</table>"


def _suspects(audit: Audit, rows: Sequence[int], picture: Picture) -> Iterable[str]:
    if not rows:
        return
    yield f"<h2>Labels worth a look</h2>\n<p>Most suspicious first, judged by {_text(audit.features)}.</p>\n<div>"
    for row in rows:
        doubt = audit.doubts[row]
        assert doubt is not None
        labels = f"<b>{_text(audit.label(row))}</b>, or {_text(doubt.other)}? ({doubt.margin:.2f})"
        yield _figure(audit, row, labels, picture)
    yield "</div>"


def _groups(title: str, audit: Audit, groups: Sequence[Group], picture: Picture) -> Iterable[str]:
    if not groups:
        return
    shown = "" if len(groups) <= MAX_GROUPS else f" (the first {MAX_GROUPS} of {len(groups):,})"
    yield f"<h2>{title}{shown}</h2>"
    for group in groups[:MAX_GROUPS]:
        figures = [_figure(audit, row, f"<b>{_text(audit.label(row))}</b>", picture) for row in group[:MAX_MEMBERS]]
        more = f"<p>and {len(group) - MAX_MEMBERS:,} more</p>" if len(group) > MAX_MEMBERS else ""
        yield f"<div class=group>{''.join(figures)}{more}</div>"


def _agreeing(audit: Audit, groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if len({audit.label(row) for row in group}) == 1]


def _figure(audit: Audit, row: int, caption: str, picture: Picture) -> str:
    name = _text(audit.survey.inspections[row].relative)
    return f'<figure><img src="{picture(row)}" alt=""><figcaption>{caption}<br>{name}</figcaption></figure>'


def _finding(finding: Finding) -> Iterable[str]:
    yield f"<h2 class={finding.severity}>{finding.severity}: {_text(finding.line)}</h2>\n<ul>"
    yield from (f"<li>{_text(case)}</li>" for case in finding.cases[:MAX_CASES])
    more = len(finding.cases) - MAX_CASES
    yield "</ul>" + (f"<p>and {more:,} more</p>" if more > 0 else "")


def _text(name: str) -> str:
    return escape(printable(name))
