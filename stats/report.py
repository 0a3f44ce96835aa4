"""report.html: text, figures and tables as one file that asks for nothing else, in light and dark, on phones and paper.

    from stats import plots, report

    svg = plots.lines({"crowd": (n, rate, low, high)}, "Best-of-n", "n", "win rate in %", log_x=True)
    report.write(out / "report.html", "Over-optimisation", {
        "Best-of-n": [report.prose("One paragraph.\\n\\nAnother one."),
                      report.figure(svg, "What is seen here.", ["n", "win rate"], rows)],
        "How to make it again": [report.code("python farm.py --study overoptimization")]})

A page is sections {heading: [parts]}. A part is HTML, made by prose(), figure(), table(), details() or code(), which
take plain text and escape it.
"""
import json
import re
from math import isfinite
from pathlib import Path

from data.files import write_whole
from stats.plots import xml
from stats.tables import plain

TEMPLATE = Path(__file__).with_suffix(".html")
NUMBER = re.compile(r"[<~$+−-]*\d.*")


def write(path, title, sections, lead=""):
    """Write page() to a file."""
    write_whole(path, [page(title, sections, lead).encode()])


def page(title, sections, lead=""):
    """The page as text. sections: {heading: [parts]}, those without parts are left out; lead: text below the title."""
    sections = {heading: parts for heading, parts in sections.items() if parts}
    names = {heading: re.sub(r"\W+", "-", heading.lower()).strip("-") for heading in sections}
    links = "".join(f'<a href="#{name}">{xml(heading)}</a> ' for heading, name in names.items())
    body = [f"<h1>{xml(title)}</h1>", prose(lead, "lead"), f"<nav>{links}</nav>" * (len(sections) > 2)]
    for heading, parts in sections.items():
        body.append(f'<section id="{names[heading]}"><h2>{xml(heading)}</h2>{"".join(parts)}</section>')
    before, after = TEMPLATE.read_text(encoding="utf-8").split("<!-- body -->")
    return before.replace("<!-- title -->", xml(title)) + "\n".join(body) + after


# ---- parts ---------------------------------------------------------------------------------------------

def prose(text, kind=""):
    """Paragraphs: a text with blank lines between them."""
    paragraphs = [each.strip() for each in re.split(r"\n\s*\n", text) if each.strip()]
    return "".join(f'<p class="{kind}" dir="auto">{xml(each)}</p>' for each in paragraphs)


def heading(text):
    """A heading within a section."""
    return f"<h3>{xml(text)}</h3>"


def code(text):
    """A command, as it is typed."""
    return f"<pre>{xml(text)}</pre>"


def cell(x):
    """A cell's text: numbers to four digits, nothing for None and NaN, texts as they are."""
    if x is None or isinstance(x, float) and not isfinite(x):
        return ""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return re.sub(r"^-(?=[\d.])", "−", str(x))
    text = f"{x:,}" if isinstance(x, int) else f"{x:.0f}" if abs(x) >= 1e4 else f"{x:.4g}"
    return text.replace("-", "−")


def table(header, rows):
    """A table of names, numbers and texts; columns without any value are left out, those of numbers are aligned to the
    right. [[cell, ...], ...] rows; header: the heads of the columns."""
    columns = [(str(head), [cell(x) for x in column]) for head, *column in zip(header, *rows)]
    columns = [(head, cells) for n, (head, cells) in enumerate(columns) if n == 0 or any(cells)]
    kinds = ["number" if any(cells) and all(NUMBER.fullmatch(text) for text in cells if text) else
             "wrap" if max(map(len, cells), default=0) > 60 else "" for _, cells in columns]
    head = "".join(f'<th class="{kind}">{xml(text)}</th>' for (text, _), kind in zip(columns, kinds))
    lines = ["".join(f'<td class="{kind}">{xml(text)}</td>' for text, kind in zip(texts, kinds))
             for texts in zip(*(cells for _, cells in columns))]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary, *parts):
    """Parts that open at a click on the summary."""
    return f"<details><summary>{xml(summary)}</summary>{''.join(parts)}</details>"


def figure(svgs, caption, header=(), rows=(), small=False):
    """One figure of stats.plots, or a list of them side by side (`small`: more of them in a row), with a caption, and
    the numbers as a table."""
    svgs = [svgs] if isinstance(svgs, str) else svgs
    numbers = details("Numbers", table(header, rows)) if len(rows) else ""
    return (f'<figure><div class="plots{" small" * small}">{"".join(svgs)}</div>'
            f"<figcaption>{xml(caption)}</figcaption>{numbers}</figure>")


def tokens(pieces, kinds):
    """A row of tokens (texts), each of a kind: words of "learned", "end" and "padding"."""
    spans = [f'<span class="{kind}">{xml(piece.replace(chr(10), "⏎" + chr(10)))}</span>'
             for piece, kind in zip(pieces, kinds)]
    return f'<p class="tokens" dir="auto">{"".join(spans)}</p>'


def browser(models, cases):
    """Answers side by side, to be searched and filtered.

    cases  [{asked: the instruction, kind: of instruction, answers: [{by, text, verdict, won, worth}]}]: who wrote it,
           what the judge said in words, 1 if it won, 0 if it lost, .5 for a draw, None for no verdict; its true reward,
           None where nobody knows it
    """
    data = json.dumps(plain({"models": list(models), "cases": cases}), allow_nan=False).replace("<", "\\u003c")
    return ('<form class="controls" id="controls">'
            '<input type="search" id="search" placeholder="Search instructions and answers" aria-label="search">'
            '<select id="kind" aria-label="kind of instruction"></select>'
            '<select id="winner" aria-label="winner"></select></form><p class="faint" id="found" role="status"></p>'
            '<div id="cases"></div><p><button id="more" hidden>Show more</button></p>'
            "<noscript><p>The answers are shown by a script in this file.</p></noscript>"
            f'<script type="application/json" id="answers-data">{data}</script>')
