"""Numbers as text: tables for a terminal of 80 columns or for papers, AlpacaEval's leaderboard.csv, report.json.

The tables show what a person needs. The intervals, the counts of wins and draws, and everything else that
`eval.report` computes are in leaderboard.csv, the CSV files beside it and report.json, under whole names and to the
last digit.
"""
import csv
import io
import json
import re
import textwrap

from data import InputError, read_json
from data.files import write_whole
from stats import papers
from stats.ranking import CORRELATIONS, best_first

COLUMNS = ["win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "mode",
           "avg_length", "length_controlled_winrate", "lc_standard_error"]      # AlpacaEval's, in its order
EXTRA = ["lc_name",                                                             # ours: AlpacaEval's name of the fit,
         "lc_unknown",                                                          # why there is no LC,
         "win_rate_ci_low", "win_rate_ci_high", "lc_ci_low", "lc_ci_high",      # bootstrap intervals,
         "n_unusable", "n_missing", "win_rate_if_lost", "win_rate_if_won",      # what was left out,
         "diff_start", "diff_start_standard_error",                             # points more than at its start,
         "expected_win_rate", "expected_standard_error", "true_reward",         # what only the offline world knows,
         "arena_hard",                                                          # Arena-Hard's own score,
         "kl", "cpu_seconds", "judge_calls",                                    # how far it is from the start; costs
         "run", "seed", "n_runs", "win_rate_spread", "length_controlled_winrate_spread", "avg_length_spread",
         "expected_win_rate_spread", "diff_start_spread", "true_reward_spread"]     # of runs that differ in the seed
TABLES = ("leaderboard.csv", "leaderboard.md", "report.json", "comparisons.csv", "data_sets.csv", "ratings.csv")
MANY = 12                               # with more models the terminal shows only the most important tables
WIDTH = 80                              # columns of a terminal
NAME = 16                               # characters: names are never cut below this, heads of columns are cut to it
UNTOLD = "cannot be told"
NOT_PUBLISHED = ("This LC is not the one that AlpacaEval publishes, which knows the difficulty of each instruction, "
                 "too: up to 23 points lie between them (--lc_data alpaca_eval fetches the difficulties)")
PAIR = 28                               # characters that the names of two models may take together


# ---- cells ---------------------------------------------------------------------------------------------

def number(x, form=".2f"):
    return "" if x is None or x != x else format(x, form)


def between(low, high, form=".1f"):
    return "" if low is None or low != low else f"{low:{form}} to {high:{form}}"


def plus_minus(value, error, form=".1f"):
    """A number and its standard error, as far as there are such."""
    error = number(error, ".1f")
    return number(value, form) + (f" ± {error}" if error else "")


def estimate(row):
    """A correlation {value, ci_low, ci_high} with its interval, as .82 (.46 to .99)."""
    return re.sub(r"\b0\.", ".", f"{number(row['value'])} ({between(row['ci_low'], row['ci_high'], '.2f')})")


def p_value(p):
    return "<0.001" if p < .001 else number(p, ".3f")


def shortened(text, width):
    """The text, without its middle if it is longer than `width`."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[:width - 1 - tail] + "…" + text[len(text) - tail:]


def printable(text):
    """The text without characters that would change what the terminal does."""
    return "".join(c if c.isprintable() else "?" for c in text)


# ---- tables --------------------------------------------------------------------------------------------

def table(*lines):
    """Lines of cells as a table that is at most 80 columns wide; the first line is the header.

    The first column holds names and is aligned to the left, the others are aligned to the right. Columns without any
    value are left out. Names that would make the table too wide are shortened, but not below 16 characters; columns
    that do not fit beside them are printed below the others, each time with the names in front.
    """
    lines = [[printable(cell) for cell in line] for line in lines]
    names, *columns = zip(*lines)
    columns = [(shortened(head, NAME), *cells) for head, *cells in columns if any(cells)]
    room = WIDTH - sum(2 + widest(column) for column in columns)
    names = [shortened(name, max(NAME, room)) for name in names]
    blocks = in_groups(columns, WIDTH - widest(names))
    return "\n\n".join(block(names, group) for group in blocks)


def widest(column):
    return max(map(len, column))


def in_groups(columns, room):
    """The columns in groups, in order: as many beside each other as `room` characters hold."""
    groups, left = [[]], room
    for column in columns:
        width = 2 + widest(column)
        if groups[-1] and width > left:
            groups.append([])
            left = room
        groups[-1].append(column)
        left -= width
    return groups


def block(names, columns):
    """Names and columns beside each other, a line under the header."""
    columns = [[cell.ljust(widest(names)) for cell in names],
               *([cell.rjust(widest(column)) for cell in column] for column in columns)]
    head, *lines = ("  ".join(cells) for cells in zip(*columns))
    return "\n".join(line.rstrip() for line in (head, "-" * len(head), *lines))


def filled(text):
    """A sentence in lines that fit the terminal."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


FORMS = {"text": (table, filled), "md": (papers.markdown, papers.markdown_text),        # how tables and sentences look
         "latex": (papers.latex, papers.latex_comment)}


def document(parts, form="text"):
    """Sentences, and tables as [title or "", header, *lines], one below the other in one of FORMS. Tables in which no
    line has a value beside its name are left out."""
    of_table, of_sentence = FORMS[form]
    shown = []
    for part in parts:
        title, *lines = [part] if isinstance(part, str) else part
        if isinstance(part, str) or any(any(cells) for _, *cells in lines[1:]):
            shown += [of_sentence(title)] if title else []
            shown += [of_table(*lines)] if lines else []
    return "\n\n".join(shown)


# ---- the leaderboard -----------------------------------------------------------------------------------

def write_csv(rows, path):
    """{name: row} as AlpacaEval's leaderboard CSV, in this order; its columns first, then ours that any row has."""
    extra = [column for column in EXTRA if any(column in row for row in rows.values())]
    write_table(["", *COLUMNS, *extra], [{"": name, **row} for name, row in rows.items()], path)


def write_table(columns, rows, path):
    """Rows {column: value} as a CSV file with these columns."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, [file.getvalue().encode()])


def write_rows(rows, path):
    """Rows [{column: value}] as CSV, NaN as an empty cell; without any rows an older file is removed."""
    if not rows:
        return path.unlink(missing_ok=True)
    columns = dict.fromkeys(column for row in rows for column in row)
    write_table(columns, [{key: "" if value != value else value for key, value in row.items()} for row in rows], path)


def leaderboard(rows, path, form="text"):
    """Write {name: row} as AlpacaEval's leaderboard CSV, best first, and as Markdown; returns it in one of FORMS."""
    rows = best_first(rows)
    write_csv(rows, path)
    parts = board(rows)
    write_whole(path.with_suffix(".md"), [document(parts, "md").encode() + b"\n"])
    return document(parts, form)


def headline(references, lc, difficulties):
    """What the leaderboard shows. lc: as for eval.report; difficulties: whether they are known."""
    how = {"default": "by instruction" if difficulties else "without the difficulty of instructions",
           "alpaca_eval": "as AlpacaEval published it"}
    return f"win rate over {', '.join(references)} in %" + (f", LC: length-controlled, {how[lc]}" if lc in how else "")


def board(rows):
    """The leaderboard of {name: row} as parts of a document."""
    lines = [["model", "win rate", "expected", "LC", "length", "vs start", "true", "Arena-Hard"]]
    for name, row in rows.items():
        lines.append([name, plus_minus(row["win_rate"], row["standard_error"]),
                      plus_minus(row.get("expected_win_rate"), row.get("expected_standard_error")),
                      plus_minus(row.get("length_controlled_winrate"), row.get("lc_standard_error")) or untold(row),
                      str(row["avg_length"]),
                      plus_minus(row.get("diff_start"), row.get("diff_start_standard_error"), "+.1f"),
                      number(row.get("true_reward")), number(row.get("arena_hard"), ".1f")])
    sizes = sorted({row["n_total"] for row in rows.values()})
    prompts = " to ".join(dict.fromkeys([str(sizes[0]), str(sizes[-1])]))
    note = f"±: standard error over {prompts} prompts, without the noise of training (seeds)"
    return [["", *lines], note, *barn(rows), *reasons(rows), left_out(rows), *costs(rows)]


def barn(rows):
    """What the columns of the offline world say: [] or [text]."""
    said = {"expected_win_rate": "expected: the win rate over all annotators of the judge and both orders",
            "true_reward": "true: the true reward"}
    known = [text for key, text in said.items() if any(key in row for row in rows.values())]
    return ["; ".join(known)] if known else []


def untold(row):
    return UNTOLD if "lc_unknown" in row else ""


def reasons(rows):
    """Why the length-controlled win rates of some models cannot be told, in sentences."""
    said = {}
    for name, row in rows.items():
        if "lc_unknown" in row:
            said.setdefault(row["lc_unknown"], []).append(shortened(printable(name), NAME))
    return [f"LC of {', '.join(names)} {UNTOLD}: {why}" for why, names in said.items()]


def left_out(rows):
    """The models of which verdicts are unusable or missing, with the bounds of their win rates."""
    lines = [["model", "judged", "unusable", "missing", "all lost", "all won"]]
    for name, row in rows.items():
        if row.get("n_unusable") or row.get("n_missing"):
            lines.append([name, str(row["n_total"]), str(row["n_unusable"]), str(row["n_missing"]),
                          number(row["win_rate_if_lost"], ".1f"), number(row["win_rate_if_won"], ".1f")])
    return ["verdicts left out, and the win rate if all of them were lost, or won:", *lines]


def judges(rows):
    """The table of {judge: row of stats.agreement.judge_report}; a single judge has a line for each number."""
    if len(rows) == 1:
        (name, row), = rows.items()
        return ["", ["", name], *([key, number(value, "d" if isinstance(value, int) else ".2f")]
                                  for key, value in row.items() if value == value)]
    columns = {"agrees": "Human agreement", "error": "Human agreement error", "bias": "Bias", "variance": "Variance",
               "repeats": "Repeatability", "longer": "Proba. prefer longer", "$/1000": "Price [$/1000 examples]"}
    lines = [[name, *(number(row[key], ".2f" if short in ("$/1000", "longer") else ".1f")
                      for short, key in columns.items())] for name, row in rows.items()]
    return ["", ["judge", *columns], *lines]


def plain(x):
    """For JSON, which has no NaN: null."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and x != x else x


def write_json(result, path):
    write_whole(path, [json.dumps(plain(result), indent=1, allow_nan=False).encode()])


def check_folder(out, kind=""):
    """InputError if a folder has tables that are not of this kind: a report of attacks does not take the place of a
    leaderboard, nor the other way round. kind: "attack", or "" for all others."""
    there = [name for name in TABLES if (out / name).exists()]
    made = read_json(out / "report.json")
    if there and (not made or made.get("kind", "") != kind):
        raise InputError(f"{out / there[0]} is there, and is of another kind: choose another --out")


def write(result, out, form="text"):
    """Write eval.report in the folder `out`: all of it as report.json, its tables as CSV, the leaderboard as Markdown,
    too. Returns the leaderboard in one of FORMS."""
    write_json(result, out / "report.json")
    write_beside(result, out)
    return leaderboard(result["rows"], out / "leaderboard.csv", form)


def write_beside(result, out):
    """comparisons.csv, data_sets.csv and ratings.csv in the folder `out`, as far as there is something to say."""
    write_rows([{key: value for key, value in row.items() if key != "by_seed"} for row in result["compared"]],
               out / "comparisons.csv")
    write_rows([{"model": name, "data_set": dataset, **row} for name, of_model in result["by_dataset"].items()
                for dataset, row in of_model.items()], out / "data_sets.csv")
    write_rows(result.get("ratings", []), out / "ratings.csv")


# ---- runs that differ in the seed ----------------------------------------------------------------------

def write_over_seeds(result, out, form="text"):
    """As `write`, of eval.averaged: the means come first in leaderboard.csv, the single runs after them."""
    write_json(result, out / "report.json")
    write_beside(result, out)
    write_csv(result["rows"] | result["runs"], out / "leaderboard.csv")
    parts = over_seeds(result)
    write_whole(out / "leaderboard.md", [document(parts, "md").encode() + b"\n"])
    return document(parts, form)


def over_seeds(result):
    """eval.averaged as parts of a document: the means, the numbers of each run, the differences between methods."""
    lines = [["method", "runs", "win rate", "expected", "LC", "length", "vs start", "true"]]
    for name, row in result["rows"].items():
        lines.append([name, str(row["n_runs"]), with_spread(row, "win_rate"), with_spread(row, "expected_win_rate"),
                      with_spread(row, "length_controlled_winrate") or untold(row), number(row["avg_length"], ".0f"),
                      with_spread(row, "diff_start", "+.1f"), with_spread(row, "true_reward", ".2f")])
    errors = sorted(row["standard_error"] for row in result["runs"].values())
    note = ("(...): the standard deviation over the seeds, that is, how much one training differs from another. A "
            "standard error (±) knows the prompts only: for the win rate of one run it is "
            f"{errors[0]:.1f} to {errors[-1]:.1f} points.")
    rows = result["rows"]
    return [["", *lines], *barn(rows), *reasons(rows), note, *costs(rows), *each_run(result),
            differences(result["compared"])]


def costs(rows):
    """What models cost, with all stages that they needed: [] or a table with a note below."""
    lines = [[name, number(row.get("kl"), ".1f"), number(row["cpu_seconds"], ".0f"),
              number(row.get("judge_calls"), ".0f")] for name, row in rows.items() if "cpu_seconds" in row]
    note = ("KL to what training started from, in nats an answer; CPU seconds, and labels that the judge was asked for "
            "to learn from, of all stages that a model needed")
    return [["", ["model", "KL", "CPU s", "labels"], *lines], note] if lines else []


def with_spread(row, key, form=".1f"):
    spread = number(row.get(f"{key}_spread"), form.lstrip("+"))
    return number(row.get(key), form) + (f" ({spread})" if spread else "")


def each_run(result):
    """Tables of methods by runs: win rates, differences to the start, true rewards; as far as there are such."""
    columns = list(dict.fromkeys(row["run"] for row in result["runs"].values()))
    shown = []
    for title, key, error, form in (("win rate", "win_rate", "standard_error", ".1f"),
                                    ("expected", "expected_win_rate", "expected_standard_error", ".1f"),
                                    ("vs start", "diff_start", "diff_start_standard_error", "+.1f"),
                                    ("true reward", "true_reward", "", ".2f")):
        lines = [[title, *columns]]
        for method, names in result["methods"].items():
            of_run = {result["runs"][name]["run"]: result["runs"][name] for name in names.values()}
            cells = [of_run.get(column, {}) for column in columns]
            lines.append([method, *(plus_minus(row.get(key), row.get(error), form) for row in cells)])
        shown.append(["", *(line for line in lines if any(line[1:]))])
    return shown


def differences(rows):
    lines = [["", "runs", "difference", "error", "ahead"]]
    for row in rows:
        lines.append([pair_name(row["a"], row["b"]), str(row["n_runs"]), with_spread(row, "difference", "+.1f"),
                      number(row["standard_error"], ".1f"), f"{row['n_ahead']} of {row['n_runs']}"])
    return ["difference in points between methods of the same seed (its standard deviation over the seeds), its "
            "standard error over the prompts of one run, and the seeds in which the first method is ahead:", *lines]


# ---- beyond the leaderboard ----------------------------------------------------------------------------

def details(result, form="text"):
    """What eval.report says beyond the leaderboard, in one of FORMS."""
    parts = [comparisons(result["compared"], PAIR if form == "text" else 1000)]
    if len(result["rows"]) <= MANY:
        parts += [data_sets(result["by_dataset"]), positions(result["position"]), flips(result["flips"]),
                  ratings(result["ratings"]), everyone(result["matrix"])]
    else:
        parts.append("data sets, positions, ratings and who beats whom are in report.json")
    return document(parts, form)


def pair_name(a, b, width=PAIR):
    """"a - b" in at most `width` characters; the shorter of the two leaves its room to the other."""
    room = width - len(" - ")
    return f"{shortened(a, max(room // 2, room - len(b)))} - {shortened(b, max(room // 2, room - len(a)))}"


def comparisons(rows, width=PAIR):
    lines, several = [["", "difference", "clustered", "won", "lost", "p", "Holm", "needed"]], len(rows) > 1
    for row in rows:
        lines.append([pair_name(row["a"], row["b"], width),
                      plus_minus(row["difference"], row["standard_error"], "+.1f"),
                      number(row.get("clustered_standard_error"), ".1f"), str(row["n_better"]), str(row["n_worse"]),
                      p_value(row["mcnemar_p"]), p_value(row["holm_p"]) if several else "",
                      number(row["prompts_needed"], ",d")])
    clustered = any("clustered_standard_error" in row for row in rows)
    return ["difference in points on the same prompts, ± standard error" +
            (" (clustered: the error if prompts of one data set are alike)" if clustered else "") +
            "; prompts won and lost, McNemar's p" +
            (f", the same p corrected for {len(rows)} comparisons (Holm 1979)" if several else "") +
            ", prompts needed to be sure of such a difference:", *lines]


def data_sets(by_dataset):
    lines = [["data set", *by_dataset]]
    for dataset in next(iter(by_dataset.values()), ()):
        rows = [of_model[dataset] for of_model in by_dataset.values()]
        lines.append([dataset, *(plus_minus(row["win_rate"], row["standard_error"]) for row in rows)])
    return ["win rate by data set:", *lines]


def positions(rows):
    lines = [["model", "shown first", "shown second", "gap"]]
    for name, row in rows.items():
        lines.append([name, number(row["shown_first"], ".1f"), number(row["shown_second"], ".1f"),
                      plus_minus(row["gap"], row["standard_error"], "+.1f")])
    return ["win rate where the judge was shown the model's answer first, and second (if a file does not say which, "
            "as AlpacaEval draws it):", *lines]


def flips(rows):
    lines = [["model", "turned", "to the first"]]
    for name, row in rows.items():
        lines.append([name, plus_minus(row["flip_rate"], row["standard_error"]), number(row["first"], ".1f")])
    return ["asked in both orders: verdicts that turn with the order, in %, and how many of these went to the answer "
            "shown first:", *lines]


def ratings(rows):
    lines = [["model", "Elo", "95 %", "rank", "95 %"]]
    for row in rows:
        lines.append([row["model"], number(row["elo"], ".0f"), between(row["ci_low"], row["ci_high"], ".0f"),
                      number(row["rank"], "d"), between(row["rank_low"], row["rank_high"], "d")])
    return ["Bradley-Terry ratings on Elo's scale:", *lines]


def everyone(matrix):
    """Win rates of all over all: eval.report's matrix, or None."""
    names = matrix["names"] if matrix else []
    lines = [["", *names]]
    for i, name in enumerate(names):
        cells = []
        for j, (won, predicted) in enumerate(zip(matrix["win_rate"][i], matrix["predicted"][i])):
            cells.append("" if i == j else number(won, ".1f") or f"{number(predicted, '.1f')}~")
        lines.append([name, *cells])
    return ["win rate of row over column (~: never compared, predicted by the ratings):", *lines]


def correlations(found):
    """The table of stats.ranking.agreement_of_rankings."""
    lines = [["", "value", "95 %", "p"]]
    for name in CORRELATIONS:
        row = found[name]
        lines.append([name, number(row["value"], ".3f"), between(row["ci_low"], row["ci_high"], ".2f"),
                      p_value(row["p"])])
    return ["", *lines]
