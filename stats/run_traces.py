"""What report.html shows of the work itself: rows and rollouts token by token, and a request to the judge.

A section is a function of a run_report.Run, like those in run_report.py.
"""
from stats import report, traces

MARKS = {"EOS": "end", "padding": "padding"}


def of_first_run(run):
    return [stage for stage in run.stages if stage["run"] == run.stages[0]["run"]]


def coloured(row):
    """A row of traces.rows() with its tokens coloured by what they are."""
    pieces, kinds = [], []
    for kind, learned, texts in traces.parts(row):
        shown = [f"{texts[0]} × {len(texts)}"] if kind == "padding" else texts
        pieces += shown
        kinds += len(shown) * [" ".join(filter(None, ["learned" * learned, MARKS.get(kind)]))]
    return report.tokens(pieces, kinds)


def tokens(run):
    """Rows that a stage learned from, token by token."""
    parts = []
    for stage in of_first_run(run):
        rows = [coloured(row) for row in traces.rows(stage) if "kl" not in row]
        parts += [report.heading(stage["name"]), *rows] if rows else []
    said = ("Rows of the training data. Tokens on a colored ground are learned (mask 1); the others are the prompt. "
            "The framed token ends the answer; crossed out is the padding that makes rows equally long. For pairs, the "
            "preferred answer comes first.")
    return [report.prose(said), *parts] if parts else []


def rollouts(run):
    """The first and the last rollout that each online method has logged, with the numbers that it learned from."""
    parts, shown = [], []
    for stage in of_first_run(run):
        found = traces.rollouts(stage)
        shown += found
        for row in found[::max(1, len(found) - 1)]:
            head, *lines = traces.numbers(row)
            parts += [report.heading(f"{stage['name']}, step {row['step']}"), coloured(row),
                      report.prose(traces.outcome(row)), report.details("Each token", report.table(head, lines))]
    return [report.prose(traces.legend(shown)), *parts] if parts else []


def judge(run):
    """The first request to the judge that a verdict is known of: for a label to learn from, or on an answer."""
    pairs = [pair for stage in of_first_run(run) for pair in stage["pairs"]]
    judged = [*pairs, *(record for records in run.models.values() for record in records)]
    record = next((record for record in judged if record.get("raw_completion")), None)
    found = record and traces.exchange(record, run.replies)
    if not found:
        return []
    messages = "\n\n".join(f"{message['role']}:\n{message['content']}" for message in found.messages)
    return [report.prose("What was asked about one pair of answers:"), report.code(messages),
            report.prose("The reply:"), report.code(found.reply), report.prose(traces.ruling(record))]
