"""Tables for READMEs and papers: Markdown and LaTeX by hand, and as eval.py writes and prints them."""
import csv
import json

import pytest
from test_eval import annotations, evaluation, random_preferences, write

from stats.papers import latex, latex_comment, markdown, markdown_text
from stats.tables import document

LINES = ["model", "win rate", "LC", "p"], ["best_of_n", "+62.3 ± 1.7", "", "<0.001"], ["a&b|c", "", "", "1,024"]


def test_a_table_in_markdown():
    assert markdown(*LINES) == ("| model | win rate | p |\n| --- | ---: | ---: |\n"
                                "| best_of_n | +62.3 ± 1.7 | \\<0.001 |\n| a&b\\|c |  | 1,024 |")


def test_a_table_in_latex():
    assert latex(*LINES) == ("\\begin{tabular}{lrr}\n\\toprule\nmodel & win rate & p \\\\\n\\midrule\n"
                             "best\\_of\\_n & $+62.3 \\pm 1.7$ & $<0.001$ \\\\\n"
                             "a\\&b|c &  & $1{,}024$ \\\\\n\\bottomrule\n\\end{tabular}")


@pytest.mark.parametrize("name, escaped", [
    ("100%", r"100\%"), ("a{b}", r"a\{b\}"), ("x^2~", r"x\textasciicircum{}2\textasciitilde{}"), ("$#", r"\$\#"),
    ("\\input", r"\textbackslash{}input"), ("7", "7"), ("one\ntwo", "one two"), ("long…name", r"long\dots{}name")])
def test_names_say_in_latex_what_they_are(name, escaped):
    assert latex(["", "n"], [name, "7"]).splitlines()[4] == rf"{escaped} & $7$ \\"


@pytest.mark.parametrize("cell, set_as", [
    ("-2.2", "$-2.2$"), ("12.1 (3.4)", "$12.1 (3.4)$"), ("1 to 2", "1 to 2"), ("63.9~", r"63.9\textasciitilde{}"),
    ("3 of 4", "3 of 4"), ("cannot be told", "cannot be told")])
def test_only_numbers_are_set_in_math_mode(cell, set_as):
    assert latex(["", "n"], ["a", cell]).splitlines()[4] == rf"a & {set_as} \\"


def test_names_say_in_markdown_what_they_are():
    assert markdown_text("best_of_n __x__ *y* `z` [q] <b> a|b 1~") == (
        r"best_of_n \__x_\_ \*y\* \`z\` \[q] \<b> a\|b 1\~")
    assert markdown(["", "n"], ["one\ntwo", "1"]).splitlines()[2] == "| one two | 1 |"


def test_sentences_are_comments_in_latex():
    text = latex_comment("a sentence of many words " * 9)
    assert all(line.startswith("% ") and len(line) <= 80 for line in text.splitlines())
    assert text.replace("\n%", "").removeprefix("% ") == ("a sentence of many words " * 9).strip()


@pytest.fixture
def models(tmp_path):
    return [write(tmp_path / f"{name}.json", annotations(name, random_preferences(rate, seed=seed)))
            for seed, (name, rate) in enumerate({"alpha_1": .8, "beta": .5, "x" * 40: .3}.items())]


def test_the_report_in_markdown_and_latex(models, tmp_path):
    argv = (*models, "--out", tmp_path / "out", "--resamples", 20)
    shown = {form: evaluation(*argv, "--format", form) for form in ("text", "md", "latex")}
    assert all((ended.code, ended.err) == (0, "") for ended in shown.values())
    tables = shown["text"].out.count("\n---")               # a rule below each header
    board = (tmp_path / "out" / "leaderboard.md").read_text()
    assert shown["md"].out.count("| --- |") == tables == shown["latex"].out.count("\\begin{tabular}") >= 6
    assert board.strip() in shown["md"].out and board.startswith("| model | win rate | LC | length |")
    assert f"| beta - {'x' * 40} |" in shown["md"].out          # whole names
    assert "alpha\\_1 - beta & $" in shown["latex"].out and shown["latex"].out.startswith("% win rate over ref in %")


def test_the_tables_are_csv_files_beside_the_leaderboard(models, tmp_path):
    out = tmp_path / "out"
    assert evaluation(*models, "--out", out, "--resamples", 20).code == 0
    found = json.loads((out / "report.json").read_text())
    rows = {name: list(csv.DictReader(open(out / f"{name}.csv"))) for name in ("comparisons", "data_sets", "ratings")}
    for row, wanted in zip(rows["comparisons"] + rows["ratings"], found["compared"] + found["ratings"], strict=True):
        assert row == {key: "" if value is None else str(value) for key, value in wanted.items()}
    assert [(row["model"], row["data_set"], float(row["win_rate"])) for row in rows["data_sets"]] == [
        (name, dataset, row["win_rate"]) for name, of_model in found["by_dataset"].items()
        for dataset, row in of_model.items()]
    assert evaluation(models[0], "--out", out, "--resamples", 20).code == 0
    assert not (out / "ratings.csv").exists() and not (out / "comparisons.csv").exists()       # of one model


@pytest.mark.parametrize("form", ["text", "md", "latex"])
def test_a_table_without_values_is_left_out(form):
    table = ["", ["model", "first", "second"], ["a", "", ""]]
    assert document(["said", table], form) == document(["said"], form)
    assert "a" in document([[*table, ["b", "", "7"]]], form)
