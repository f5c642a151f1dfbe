"""One page of findings: a self-contained HTML file with small JPEGs inside, and the same facts as JSON.

Knows findings; does not know how they were found.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from benchmarks.real.findings import Finding, Line, Picture, Status
from sdxl.files.archives import atomic_path

PAGE, FACTS = "findings.html", "findings.json"
LONGEST_SIDE = 448
"""Pixels of a picture on the page."""
MOST_OPEN = 12
"""A table with more lines is folded if nothing in it differs."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5f6670; --paper: #fff; --card: #f5f6f8; --rule: #d9dce1;
  --ok: #1a7f37; --differs: #c0261c; --run: #9a6700; --none: #5f6670; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a7b1; --paper: #15171a; --card: #1f2226;
  --rule: #363b42; --ok: #56d364; --differs: #ff8078; --run: #e3b341; --none: #a0a7b1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.1rem; margin: 0; }
a { color: inherit; } .soft { color: var(--soft); }
section { background: var(--card); border-radius: .6rem; padding: .9rem 1rem; margin: 1rem 0; }
table { width: 100%; table-layout: fixed; border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-top: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; border: 0; }
th:first-child { width: 36%; } th:nth-child(2), th:nth-child(3) { width: 25%; } td:last-child { padding-right: 0; }
summary { cursor: pointer; color: var(--soft); }
.ok { color: var(--ok); } .differs { color: var(--differs); font-weight: 700; } .could-not-run { color: var(--run);
  font-weight: 700; } .not-for-this-base, .fact { color: var(--none); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; }
figure { margin: 0; } img { width: 100%; height: auto; border-radius: .4rem; display: block; }
figcaption { font-size: .82rem; color: var(--soft); }
pre { overflow-x: auto; white-space: pre-wrap; background: var(--paper); padding: .6rem; border-radius: .4rem;
  font-size: .8rem; }
ul { list-style: none; padding: 0; columns: 2 18rem; } li { break-inside: avoid; } ul.one { columns: 1; }
@media (max-width: 36rem) { thead { display: none; } tr { display: block; border-top: 1px solid var(--rule);
  padding: .35rem 0; } td { display: block; border: 0; padding: 0; }
  td[data-name]:before { content: attr(data-name) ": "; color: var(--soft); } td:empty { display: none; } }
"""


def write(folder: Path, about: Mapping[str, str], findings: Sequence[Finding]) -> None:
    """Write `PAGE` and `FACTS` into `folder`, each atomically.

    about: what was checked and on which machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"about": dict(about), "findings": [finding.as_json() for finding in findings]}
    for name, text in ((PAGE, page(about, findings)), (FACTS, json.dumps(facts, indent=2) + "\n")):
        with atomic_path(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def summary(findings: Sequence[Finding]) -> str:
    """How many checks ended how, such as "12 ok, 1 differs"."""
    counts = Counter(finding.status for finding in findings)
    return ", ".join(f"{counts[status]} {status}" for status in get_args(Status) if counts[status])


def page(about: Mapping[str, str], findings: Sequence[Finding]) -> str:
    """The page as one HTML document that needs no other file."""
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in about.items())
    links = "".join(
        f'<li><a href="#{finding.name}">{_text(finding.name)}</a> {_badge(finding.status)}</li>'
        for finding in findings
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Findings: {_text(summary(findings))}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Findings on {_text(about.get('base', 'the base'))}</h1><p>{_text(summary(findings))}</p>"
        f"<section><table><tbody>{rows}</tbody></table><ul>{links}</ul></section>"
        + _differences(findings)
        + "".join(map(_section, findings))
        + "</body></html>\n"
    )


def _differences(findings: Sequence[Finding]) -> str:
    """What a reader should look at first: every line that differs, under its check."""
    rows = "".join(
        f'<li><a href="#{finding.name}">{_text(finding.name)}</a>: {_text(line.what)}: '
        f'<span class="differs">{_text(line.found)}</span>, expected {_text(line.expected)}</li>'
        for finding in findings
        for line in finding.lines
        if line.verdict == "differs"
    )
    return f'<section><h2>What differs</h2><ul class="one">{rows}</ul></section>' if rows else ""


def _section(finding: Finding) -> str:
    memory = f", {finding.peak_gib:g} GiB of GPU memory at most" if finding.peak_gib is not None else ""
    parts = [
        f'<section id="{finding.name}"><h2>{_text(finding.question)}</h2>',
        f'<p class="soft">{_badge(finding.status)} · {_text(finding.name)} · {finding.seconds:g} s{memory}</p>',
    ]
    if finding.error:
        parts.append(f"<pre>{_text(finding.error)}</pre>")
    if finding.lines:
        heads = "".join(f"<th>{head}</th>" for head in ("what", "expected", "found", ""))
        ordered = sorted(finding.lines, key=lambda line: line.verdict != "differs")
        rows = "".join(_row(_cells(line), line.verdict) for line in ordered)
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        if len(ordered) > MOST_OPEN and finding.status != "differs":
            table = f"<details><summary>{len(ordered)} lines</summary>{table}</details>"
        parts.append(table)
    if finding.pictures:
        parts.append(f'<div class="pictures">{"".join(map(_figure, finding.pictures))}</div>')
    return "".join([*parts, "</section>"])


def _cells(line: Line) -> tuple[str, str, str, str]:
    return line.what, line.expected, line.found, "" if line.verdict == "fact" else line.verdict


def _row(cells: tuple[str, str, str, str], verdict: str = "fact") -> str:
    what, expected, found, said = map(_text, cells)
    return (
        f'<tr><td>{what}</td><td data-name="expected">{expected}</td><td data-name="found">{found}</td>'
        f'<td class="{_class(verdict)}">{said}</td></tr>'
    ).replace('<td data-name="expected"></td>', "<td></td>")


def _figure(picture: Picture) -> str:
    caption = _text(picture.caption)
    return f'<figure><img src="{data_uri(picture.image)}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def data_uri(image: Image.Image) -> str:
    """A small JPEG of the picture, as the address of an image."""
    small = image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _badge(status: str) -> str:
    return f'<span class="{_class(status)}">{status}</span>'


def _class(name: str) -> str:
    return name.replace(" ", "-")


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
