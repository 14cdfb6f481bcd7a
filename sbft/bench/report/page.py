"""The report of a suite as Markdown, and as an HTML page that requires no other file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sbft.bench.report import notes as sentences
from sbft.bench.report.comparison import Comparison, Row
from sbft.bench.report.pictures import Picture
from sbft.bench.report.tables import Table, front, in_markdown, main_table, memory_table, rates_table

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --page: #ffffff; --line: #d8dce1; --quiet: #5b6470; --band: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --page: #15181c; --line: #353b43; --quiet: #9aa4b0; --band: #1d2126; }
}
body { color: var(--text); background: var(--page); font: 16px/1.55 system-ui, sans-serif; max-width: 66rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.4rem; } h3 { font-size: 1.05rem; margin-top: 1.8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; font-weight: 600; }
th:first-child, td:first-child, td.reason { text-align: left; }
td.reason { color: var(--quiet); font-style: italic; white-space: normal; }
tr:nth-child(odd) td { background: var(--band); }
p.note, figcaption, li { color: var(--quiet); font-size: 0.88rem; }
p.note { margin: 0.3rem 0; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
code { font-family: ui-monospace, monospace; font-size: 0.88em; background: var(--band); padding: 0.1em 0.35em;
  border-radius: 3px; }
""".strip()


@dataclass(frozen=True)
class _Section:
    """A task's tables."""

    title: str
    main: Table
    notes: list[str]
    memory: Table | None
    rates: Table | None


def _sections(comparison: Comparison) -> list[_Section]:
    sections = []
    for title, rows in comparison.groups():
        table = main_table(comparison, rows)
        best = _front_sentence(rows)
        notes = [*table.notes(), *([best] if best else [])]
        sections.append(_Section(title, table, notes, memory_table(rows), rates_table(rows)))
    return sections


def _front_sentence(rows: list[Row]) -> str:
    best = front(rows)
    failed = [row.variant for row in rows if row.failed and row.records]
    on_front = (
        f"On the Pareto front of score and peak memory: {', '.join(row.variant for row in best)}." if best else ""
    )
    left_out = f"Not considered for the Pareto front, because a seed failed: {', '.join(failed)}." if failed else ""
    return f"{on_front} {left_out}".strip()


def _title(comparison: Comparison) -> str:
    return f"Comparison of {len(comparison.suite.methods)} methods"


def markdown(comparison: Comparison, pictures: Sequence[Picture]) -> str:
    """The report as Markdown, with links to the pictures beside it."""
    parts = [
        f"# {_title(comparison)}",
        in_markdown(sentences.summary(comparison)),
        f"    {sentences.command(comparison)}",
    ]
    by_name = {picture.path.name: picture for picture in pictures}
    sections = _sections(comparison)
    for section in sections:
        parts += [f"## {in_markdown(section.title)}", section.main.markdown(), _lines(section.notes)]
    for picture in by_name.values():
        parts += [f"## {picture.title}", f"![{picture.title}]({picture.path.name})", in_markdown(picture.caption)]
    for section in sections:
        if section.memory is not None:
            parts += [f"## Peak memory by part, MiB: {in_markdown(section.title)}", section.memory.markdown()]
    for section in sections:
        if section.rates is not None:
            title = f"## Validation scores by learning rate: {in_markdown(section.title)}"
            parts += [title, section.rates.markdown(), _lines(section.rates.notes())]
    parts += ["## Notes", "\n".join(f"- {in_markdown(sentence)}" for sentence in sentences.notes(comparison))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _lines(notes: list[str]) -> str:
    return "  \n".join(map(in_markdown, notes))


def page(comparison: Comparison, pictures: Sequence[Picture]) -> str:
    """The report as one HTML file with embedded pictures."""
    body = [
        f"<h1>{html.escape(_title(comparison))}</h1>",
        _paragraph(sentences.summary(comparison)),
        f"<p><code>{html.escape(sentences.command(comparison))}</code></p>",
    ]
    sections = _sections(comparison)
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", section.main.html()]
        body += [_paragraph(note, "note") for note in section.notes]
    body += [_figure(picture) for picture in pictures]
    for section in sections:
        if section.memory is not None:
            body += [f"<h2>Peak memory by part, MiB: {html.escape(section.title)}</h2>", section.memory.html()]
    for section in sections:
        if section.rates is not None:
            body += [f"<h2>Validation scores by learning rate: {html.escape(section.title)}</h2>", section.rates.html()]
            body += [_paragraph(note, "note") for note in section.rates.notes()]
    items = "\n".join(f"<li>{_inline(sentence)}</li>" for sentence in sentences.notes(comparison))
    body += ["<h2>Notes</h2>", f"<ul>\n{items}\n</ul>"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(_title(comparison))}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    title = html.escape(picture.title)
    return (
        f'<h2>{title}</h2>\n<figure><img alt="{title}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{_inline(picture.caption)}</figcaption></figure>"
    )


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{_inline(text)}</p>' if kind else f"<p>{_inline(text)}</p>"


def _inline(text: str) -> str:
    return re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))
