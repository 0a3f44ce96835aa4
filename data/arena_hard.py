"""Arena-Hard v2's judgments as AlpacaEval's records, so that everything that eval.py does can be done with them.

Its folder, as it is published:

    model_judgment/<judge>/<model>.jsonl    {uid, category, model, baseline, games: [{score}, {score}]}
    model_answer/<model>.jsonl              {uid, messages: [..., {content: {answer}}]}

Both orders are judged: in the first game the baseline's answer is A, in the second it is B. A strong verdict counts as
three weak ones. Here the preference of a prompt is the mean of its two verdicts, weighted in this way, and every prompt
counts alike; Arena-Hard's own score is the weighted mean of all verdicts on all prompts. A uid stands for a prompt;
categories have different baselines. Left out: style control (of headers, lists and bold text; length is
controlled as everywhere else) and the texts of the prompts, which no number needs.
"""
from pathlib import Path

from data import PATH, InputError, check_kinds
from data.alpaca_eval import names_of, once
from data.sets import read_records

ARENA_HARD = "Arena-Hard: its own score, in which a strong verdict counts three times"
STRONG = 3                              # a strong verdict counts as so many weak ones
VERDICTS = {"A>>B": (1, STRONG), "A>B": (1, 1), "A=B": (.5, 1), "A<B": (0, 1), "A<<B": (0, STRONG),
            "B>>A": (0, STRONG), "B>A": (0, 1), "B=A": (.5, 1)}         # score: (what A wins, how often it counts)


def read_arena_hard(paths):
    """{name: records} of all models in files of judgments, or in the folder of a judge. A model has a name for each
    baseline that it was compared with."""
    files = [file for path in map(Path, paths) for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    models, texts = {}, {}
    for whole, file in {file.resolve(): file for file in files}.items():        # named twice, read once
        answers = whole.parent.parent.parent / "model_answer"
        records = [record_of(file, i, row) for i, row in enumerate(read_records(file, ("uid", "model", "baseline")))]
        once(file, records, lambda record: (record["generator_1"], record["generator_2"]))
        for record in records:
            for number in "12":
                written, uid = answers / f"{record[f'generator_{number}']}.jsonl", record["instruction"]
                texts[written] = texts.get(written) or read_answers(written)
                if uid not in texts[written]:
                    raise InputError(f"{written}: has no answer to {uid}, which {file} is about")
                record[f"output_{number}"] = texts[written][uid]
            models.setdefault((record["generator_2"], record["generator_1"], whole), []).append(record)
    if not models:
        raise InputError(f"{', '.join(map(str, paths))}: no .jsonl file in this folder")
    names = names_of(models)
    return {names[key]: records for key, records in models.items()}


def record_of(file, i, row):
    """AlpacaEval's record for row i of a file of judgments, without the answers. Its preference is None if a game has
    no verdict. battles: the number of weak verdicts that the row counts for."""
    games = row.get("games")
    if not isinstance(games, list) or len(games) != 2:
        raise InputError(f"{file}: row {i} has no list of two games")
    check_kinds(f"{file}: row {i}", row, {"model": PATH, "baseline": PATH})     # where their answers are
    scores = [game.get("score") if isinstance(game, dict) else None for game in games]
    if strange := [score for score in scores if score is not None and str(score) not in VERDICTS]:
        raise InputError(f"{file}: row {i} has the score {strange[0]!r:.40}, which is none of {', '.join(VERDICTS)}")
    category = row.get("category") or ""
    if not isinstance(category, str):
        raise InputError(f"{file}: row {i} has no text under 'category', but {category!r:.40}")
    record = {"instruction": row["uid"], "dataset": category, "generator_1": row["baseline"],
              "generator_2": row["model"], "is_switched": None, "preference": None}
    if None in scores:
        return record
    (baseline_won, one), (model_won, two) = (VERDICTS[score] for score in scores)
    preference = 1 + (one * (1 - baseline_won) + two * model_won) / (one + two)
    return record | {"preference": preference, "preference_by_order": [2 - baseline_won, 1 + model_won],
                     "battles": one + two}


def read_answers(file):
    """{uid: text} of a model's answers."""
    if not file.exists():
        raise InputError(f"there is no {file}: the lengths of answers are read there, as Arena-Hard's folder has them")
    found = {}
    for i, record in enumerate(read_records(file, ("uid",))):
        try:
            content = record["messages"][-1]["content"]
            text = content["answer"] if isinstance(content, dict) else content
        except (LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise InputError(f"{file}: row {i} has no text under messages, content, answer")
        found[record["uid"]] = text
    return found


def arena_hard_score(records):
    """Arena-Hard's own score of a model in percent: the share of all verdicts that it won."""
    judged = [record for record in records if record["preference"] is not None]
    battles = sum(record["battles"] for record in judged)
    return 100 * sum(record["battles"] * (record["preference"] - 1) for record in judged) / battles if battles else None
