"""Tables and sentences in Markdown, and in LaTeX with booktabs, for papers and READMEs.

A table is given as lines of cells, the header first, as to stats.tables.table. Its first column holds names.
"""
import re
import textwrap

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
           "±": r"$\pm$", "…": r"\dots{}", **{c: "\\" + c for c in "&%$#_{}"}}
NUMBER = re.compile(r"<?[+-]?\d[\d.,]*( ± [\d.]+)?( \([\d.]+\))?")


def filled_columns(lines):
    """The lines without the columns that have no value in any line but the header; no cell has a line break."""
    kept = [n for n, (_, *cells) in enumerate(zip(*lines)) if n == 0 or any(cells)]
    return [[" ".join(line[n].split()) for n in kept] for line in lines]


def markdown_text(text):
    """The text with a backslash before each character that Markdown would take for its own."""
    return re.sub(r"[\\`*<|\[~]|\b_|_\b", r"\\\g<0>", text)


def markdown(*lines):
    """The table in GitHub's Markdown."""
    head, *rows = [list(map(markdown_text, line)) for line in filled_columns(lines)]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def latex_text(text):
    """The text with LaTeX's special characters escaped."""
    return "".join(SPECIAL.get(c, c) for c in text)


def latex_cell(text):
    """A cell: a number, with its errors, is set in math mode."""
    if NUMBER.fullmatch(text):
        return "$" + text.replace("±", r"\pm").replace(",", "{,}") + "$"
    return latex_text(text)


def latex(*lines):
    """The table as a tabular environment; its rules are those of the package booktabs."""
    lines = filled_columns(lines)
    head, *rows = [" & ".join([latex_text(name), *map(latex_cell, cells)]) + r" \\" for name, *cells in lines]
    columns = "l" + "r" * (len(lines[0]) - 1)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule",
                      r"\end{tabular}"])


def latex_comment(text):
    """The text as lines that LaTeX does not typeset."""
    return textwrap.fill(text, 80, initial_indent="% ", subsequent_indent="% ", break_on_hyphens=False)
