"""A model's answers to instructions, over the same HTTP and into the same cache as verdicts."""
from data.alpaca_eval import question
from data.judges import JudgeError
from data.judges.verdicts import content, without_thought


def complete(records, model, judge, temperature=0.7, max_tokens=2048):
    """Answers of `model` to records {instruction, input, ...}: AlpacaEval's outputs, one for each, in their order.

    Equal instructions get the same answer. JudgeError if one has none; those that came are kept, and not asked again.
    """
    lines = judge.complete([{"model": model, "messages": [{"role": "user", "content": question(record)}],
                             "temperature": temperature, "max_tokens": max_tokens} for record in records])
    failed = [line["cause"] for line in lines if "choice" not in line]
    if failed:
        raise JudgeError(f"{len(failed)} of {len(records)} instructions have no answer by {model} ({failed[0]}"
                         f"{f'; {judge.fault}' if judge.fault else ''}); the others are kept in {judge.cache.path}")
    asked = [{key: record[key] for key in ("instruction", "input", "dataset") if key in record} for record in records]
    return [{**one, "output": without_thought(content(line["choice"]["message"]))[0].lstrip("\n"), "generator": model}
            for one, line in zip(asked, lines)]
