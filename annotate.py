"""The simulated annotators: pairs of answers in, preferences out, by LLM judges over raw HTTP.

    python annotate.py PAIRS.json --pool p_ann --judge MODEL --out ANNOTATED.json
    python annotate.py OUTPUTS.json --reference REF.json --pool p_eval --judge big,mid,small --dry_run
    python annotate.py INSTRUCTIONS.json --complete MODEL --out OUTPUTS.json            answers instead of labels

A pool of annotators stands for a crowd, and labels flipped on purpose for its disagreement (AlpacaFarm, arXiv
2305.14387): p_ann is the pool with a quarter of the labels flipped, p_eval the pool without, p_single one greedy judge.
The judge is any server that speaks OpenAI's chat completions, at OPENAI_BASE_URL with OPENAI_API_KEY; "barn" and
"barn-human" are the offline world's, "serve:PATH" is a checkpoint on this machine, "me" is you, on a page.
How they are asked is in data/judges/.
"""
import argparse
import contextlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import InputError, run, underscored
from data.alpaca_eval import question, read_pairs
from data.judges import JudgeError
from data.judges.answers import complete
from data.judges.client import ADDRESS, NO_MESSAGE, Judge, dollars, on_this_machine, shorten
from data.judges.person import PERSON, Person
from data.judges.pools import read_pool
from data.judges.prompts import Annotator, paper_pool, request_body, single, verdicts
from data.sets import read_records
from stats.agreement import judge_report
from stats.tables import number, table

CROWDS = {"barn": ("barn-sim", 13), "barn-human": ("barn-human", 16)}   # the offline world's, as many as in the paper
POOLS = {"p_ann": .25, "p_eval": 0.0, "p_single": 0.0}                  # name: share of labels that are flipped


def pool(judge, kind="p_eval"):
    """The annotators of a judge: a model, or a big, a mid and a small one with commas between.

    `kind` is one of POOLS, or a file of annotators (data.judges.pools); `judge` is the model of those that name none.
    """
    if PERSON.fullmatch(judge):
        return [Annotator(judge, judge)]
    if kind not in POOLS:
        if not kind.endswith((".json", ".jsonl")):
            raise InputError(f"--pool {kind}: choose {', '.join(POOLS)}, or a file of annotators (.json)")
        if judge in CROWDS or "," in judge:
            raise InputError(f"--judge {judge} does not go with the annotators in {kind}: name one model, or none")
        return read_pool(kind, "" if judge == kind else judge)
    return [replace(one, pool=kind) for one in crowd(judge, kind)]


def crowd(judge, kind):
    """The annotators of a pool that is not a file."""
    if judge in CROWDS:
        prefix, size = CROWDS[judge]
        names = [f"{prefix}-{i:02d}" for i in range(1 if kind == "p_single" else size)]
        return [Annotator(name, name) for name in names]
    models = judge.split(",")
    if len(models) not in (1, 3) or not all(models):
        raise InputError(f"--judge {judge}: one model, or three (big,mid,small)")
    return single(models[0]) if kind == "p_single" else paper_pool(models)


# ---- pairs -> preferences ------------------------------------------------------------------------------

def draw(what, salt, choices, weights=None):
    """AlpacaEval's random_seeded_choice: the text alone decides, the same in every process."""
    return random.Random(what + salt).choices(choices, weights=weights)[0]


class Question:
    """One pair to be asked in one order, and the record it belongs to."""

    def __init__(self, record, annotator, switched, salt):
        self.record, self.annotator, self.switched, self.salt = record, annotator, switched, salt
        first, second = ("output_2", "output_1") if switched else ("output_1", "output_2")
        self.texts = question(record), record[first], record[second]
        self.answer, self.share, self.preference, self.cause = {}, 1, None, ""      # share: pairs in its request


def plan(pairs, annotators, seed=0, flip=0.0, both_orders=False):
    """(records, questions): who is asked what, in which order, and which labels are coins. See `annotate`."""
    if not 0 <= flip <= 0.5:
        raise ValueError(f"flip is the fraction of wrong labels, between 0 and 0.5, not {flip}")
    records, questions = [], []
    for pair in pairs:
        salt = question(pair) + str(seed) + pair.get("seed", "")
        annotator = draw("annotator", salt, annotators)
        switched = draw("is_switched_outputs", salt, [False, True])
        coin = draw("noisy_preference", salt, [None, 1, 2], [1 - 2 * flip, flip, flip])
        same = pair["output_1"] == pair["output_2"]
        records.append({**pair, "annotator": annotator.name, "is_switched": None if both_orders else switched,
                        "preference": 1.5 if same else coin, "scored_by": "equal" if same else coin and "coin",
                        "raw_completion": None})
        if not same and not coin:
            questions += [Question(records[-1], annotator, order, salt)
                          for order in ((False, True) if both_orders else (switched,))]
    return records, questions


def batches(questions):
    """Lists of questions that go into one request: of one annotator, as many as it sees at a time, in their order."""
    waiting, full = {}, []
    for one in questions:
        waiting.setdefault(one.annotator, []).append(one)
        if len(waiting[one.annotator]) == one.annotator.batch:
            full.append(waiting.pop(one.annotator))
    return full + list(waiting.values())


def requests_of(groups, logprobs, longer=1):
    """The request for each group of questions, with room for an answer so many times longer than usual."""
    return [request_body(group[0].annotator, [one.texts for one in group], longer * group[0].annotator.max_tokens,
                         logprobs) for group in groups]


def ask(groups, judge, logprobs, longer=1):
    """Ask the judge about groups of questions, and file in each what came of it."""
    if isinstance(judge, Person):
        # In both orders: each pair in the drawn one first, and in the other after all of them.
        return judge.answer(sorted((one for group in groups for one in group), key=lambda one: one.switched != draw(
            "is_switched_outputs", one.salt, [False, True])))
    for group, line in zip(groups, judge.complete(requests_of(groups, logprobs, longer))):
        found = verdicts(group[0].annotator, line.get("choice"), len(group), line.get("cause"))
        for one, (preference, cause) in zip(group, found):
            one.answer, one.share = line, len(group)
            one.preference = 3 - preference if preference and one.switched else preference
            one.cause = cause


def annotate(pairs, annotators, judge, seed=0, flip=0.0, both_orders=False, logprobs=False, costs=False):
    """Preferences for pairs {instruction, output_1, output_2, ...}, as AlpacaEval's records.

    A record is its pair and
      annotator        the name of the one that was drawn for it
      is_switched      output_2 was shown first, as Output (a); None if it was asked in both orders
      preference       1: output_1 is better, 2: output_2 is, 1.5: equal texts, None: no usable verdict
      scored_by        "text"; "logprobs" of the deciding token, where asked for and given (the preference is a
                       fraction then); "coin"; "equal"; or why there is no verdict: "refusal", "cut off", ...
      raw_completion   what the judge said, None if it was not asked
      judge, pool, effort, date  who that is: what --judge, --pool and --reasoning_effort say, and the day of the answer
      preference_by_order  with `both_orders`: [with output_1 shown first, with output_2]; `preference` is their mean,
                       None if either is; raw_completion is a list, too
      price_per_example, time_per_example  with `costs`: $ (None: unknown) and seconds; not the same in every run
    A fraction `flip` of the labels is wrong on purpose: 2 * flip of them are coins, tossed instead of asking, so they
    cost nothing. Pairs with one instruction share their draws, unless each has a "seed" string too. A pair without a
    verdict is asked about once more if it had company, was cut off or got garbage: alone, with room for a longer
    answer. JudgeError if more than judge.max_unusable of those asked have no usable verdict.
    """
    records, questions = plan(pairs, annotators, seed, 0 if isinstance(judge, Person) else flip, both_orders)
    for record in records:
        record |= {"judge": judge.title, "pool": annotators[0].pool, "effort": judge.effort, "date": None}
    groups = batches(questions)
    ask(groups, judge, logprobs)
    hits = judge.hits
    failed = [one for one in questions if one.cause in ("cut off", NO_MESSAGE) or one.cause and one.share > 1]
    if failed:
        ask([[one] for one in failed], judge, logprobs, longer=2)

    by_record = {}
    for one in questions:
        by_record.setdefault(id(one.record), []).append(one)
    unusable = Counter()
    for said in by_record.values():
        record, causes = said[0].record, [one.cause for one in said if one.cause]
        texts = [one.answer.get("choice", {}).get("message", {}).get("content") for one in said]
        record["raw_completion"] = texts if both_orders else texts[0]
        if "time" in said[0].answer:
            record["date"] = time.strftime("%Y-%m-%d", time.gmtime(said[0].answer["time"]))
        record["preference"] = None if causes else statistics.mean(one.preference for one in said)
        soft = any(one.preference not in (1, 2) for one in said)
        how = said[0].answer.get("scored_by") or ("logprobs" if soft else "text")
        record["scored_by"] = causes[0] if causes else how
        if both_orders:
            record["preference_by_order"] = [one.preference for one in said]
        if costs:
            paid = [dollars(one.answer.get("usage"), judge.price(one.annotator.model)) for one in said]
            record["price_per_example"] = None if None in paid else sum(
                each / one.share for each, one in zip(paid, said))
            record["time_per_example"] = sum(one.answer.get("seconds", 0) / one.share for one in said)
        unusable.update(causes[:1])
    report(records, questions, judge, len(groups), hits, unusable)
    return records


def report(records, questions, judge, requests, hits, unusable):
    """Say what was asked and what came of it; JudgeError if too little did."""
    asked = sum(record["scored_by"] not in ("coin", "equal") for record in records)
    kinds = Counter(record["scored_by"] for record in records)
    failed = sum(unusable.values())
    causes = ", ".join(f"{n} {cause}" for cause, n in unusable.most_common())
    print(f"judge: {asked} asked{f' in {requests} requests' if requests != asked else ''} ({hits} from the cache), "
          f"{asked - failed} usable, {failed} unusable{f' ({causes})' if causes else ''}, {kinds['coin']} coins, "
          f"{kinds['equal']} identical{f', {soft} by log-probabilities' if (soft := kinds['logprobs']) else ''}",
          flush=True)
    if failed > judge.max_unusable * asked:
        bad = next(one for one in questions if one.cause)
        said = (bad.answer.get("choice") or {}).get("message", {}).get("content")
        example = shorten(said or judge.fault)
        raise JudgeError(f"{failed} of {asked} verdicts are unusable, for example {example!r}; "
                         f"at most {judge.max_unusable:.0%} may be. Every answer is kept in {judge.cache.path}")


# ---- finding the judge ---------------------------------------------------------------------------------

@contextlib.contextmanager
def connect(judge, cache, workers=8, max_unusable=0.02, **options):
    """The Judge behind a name; `cache` is the path of the file of its answers, `options` are Judge's.

    "barn" and "barn-human" start the offline world's server, "serve:PATH" serves the checkpoint or run folder at PATH,
    any other is a model at OPENAI_BASE_URL (AZURE_OPENAI_ENDPOINT), asked with OPENAI_API_KEY (AZURE_OPENAI_API_KEY).
    """
    with contextlib.ExitStack() as stack:
        if PERSON.fullmatch(judge):
            clicks, replay = Path(cache).with_name("me.jsonl"), options.get("replay", False)
            yield stack.enter_context(contextlib.closing(Person(judge, clicks, replay, max_unusable)))
            return
        if judge in CROWDS:
            from data.barn.judge import serve       # real judges do without the offline world
            where = {"base_url": stack.enter_context(serve()), "endpoint": "barn"}
        elif judge.startswith("serve:"):
            where = {"base_url": stack.enter_context(served(judge)), "endpoint": fingerprint(judge[6:])}
        else:
            where = remote(options.get("replay"))
        found = stack.enter_context(contextlib.closing(
            Judge(cache=cache, workers=workers, max_unusable=max_unusable, **where, **options)))
        found.title = judge
        yield found


def remote(replay=False):
    """base_url, key, headers and url of the server that the environment names."""
    env, azure = os.environ, os.environ.get("AZURE_OPENAI_ENDPOINT", "").rstrip("/")
    azure = azure if not (env.get("OPENAI_BASE_URL") or env.get("OPENAI_API_BASE")) else ""
    base_url = azure or env.get("OPENAI_BASE_URL") or env.get("OPENAI_API_BASE") or "https://api.openai.com/v1"
    base_url, name = base_url.rstrip("/"), "AZURE_OPENAI_API_KEY" if azure else "OPENAI_API_KEY"
    key = env.get(name, "").strip()
    if not ADDRESS.fullmatch(base_url):             # not shown: URLs have been seen with passwords in them
        raise JudgeError(f"{'AZURE_OPENAI_ENDPOINT' if azure else 'OPENAI_BASE_URL'} must look like "
                         "https://host/v1 or http://localhost:8000/v1")
    if not key and not replay and not on_this_machine(base_url):
        raise JudgeError(f"{name} is not set, and {base_url} is not on this machine: export it (any word will do "
                         "for a server without keys)")
    if not re.fullmatch(r"[!-~]*", key):            # requests would show it in its own error
        raise JudgeError(f"{name} holds a space or another character that no key has")
    if azure:
        version = env.get("OPENAI_API_VERSION", "2024-10-21")
        return {"base_url": base_url, "key": key, "headers": {"api-key": key} if key else {},
                "url": lambda model: f"{base_url}/openai/deployments/{model}/chat/completions?api-version={version}"}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for header, variable in (("OpenAI-Organization", "OPENAI_ORG_ID"), ("OpenAI-Project", "OPENAI_PROJECT_ID")):
        headers |= {header: env[variable]} if env.get(variable) else {}
    return {"base_url": base_url, "key": key, "headers": headers}


@contextlib.contextmanager
def served(judge):
    """Serve the checkpoint of "serve:PATH" from a process of its own; yields the base URL."""
    command = [sys.executable, str(Path(__file__).parent / "serve.py"), judge[6:], "--port", "0", "--name", judge]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = next(filter(None, (re.search(r"http://\S+/v1", line) for line in server.stdout)), None)
            if not url:
                raise JudgeError(f"serve.py could not serve {judge[6:]}")
            yield url[0]
        finally:
            server.terminate()


def fingerprint(path):
    """What a checkpoint's answers are filed under: other weights in the same place are another judge."""
    files = sorted(Path(path).rglob("*.safetensors")) if Path(path).is_dir() else []
    return "serve:" + ",".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


# ---- money ---------------------------------------------------------------------------------------------

def price_of(said=""):
    """A function from a model's name to its price, ($ per million prompt tokens, completion tokens), None if unknown.

    `said` is --price, "2.5,10" for all models; else a model costs what the longest name in
    data/judges/prices.json costs that it begins with.
    """
    if said:
        prices = [float(x) for x in said.split(",") if re.fullmatch(r"\d+(\.\d+)?", x)]
        if len(prices) != 2:
            raise InputError(f"--price {said}: $ per million tokens of prompt and of completion, as in 2.5,10")
        return lambda model: tuple(prices)
    listed = json.loads((Path(__file__).parent / "data" / "judges" / "prices.json").read_text(encoding="utf-8"))
    names = sorted((name for name in listed if name != "about"), key=len, reverse=True)
    return lambda model: next((tuple(listed[name]) for name in names if model.startswith(name)), None)


def estimate(questions, judge, logprobs):
    """What asking would take, as text: about four characters make a token, and no answer is longer than allowed."""
    if isinstance(judge, Person):
        return judge.estimate(questions)
    bodies = requests_of(batches(questions), logprobs)
    missing = {key: body for body in bodies if not judge.cache.get(key := judge.name(body))}.values()
    said, cost = Counter(), 0.0
    for body in missing:
        usage = {"prompt_tokens": sum(len(message["content"]) for message in body["messages"]) // 4,
                 "completion_tokens": body["max_tokens"]}
        said.update(usage)
        known = judge.price(body["model"])
        cost = math.nan if known is None else cost + dollars(usage, known)
    return (f"{len(questions)} questions in {len(bodies)} requests, {len(bodies) - len(missing)} of them in the cache; "
            f"the others about {said['prompt_tokens']:,} tokens of prompt and at most {said['completion_tokens']:,} of "
            f"answers, {'price unknown (--price)' if math.isnan(cost) else f'at most ${cost:.2f}'}")


# ---- the command ---------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="annotate.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pairs", help="pairs {instruction, output_1, output_2}, lists of outputs, or outputs with --reference; .json, "
        ".jsonl, .gz")
    add("--reference", default="", metavar="FILE", help="what the outputs are compared with: output_1 of the pairs")
    add("--judge", default="", metavar="MODEL", help="barn (default), barn-human, serve:PATH, a model, or "
        "big,mid,small; me: a page asks you")
    add("--judge_models", default="", metavar="BIG,MID,SMALL", help="the same as --judge")
    add("--pool", default="p_ann", help="p_ann: with flips, p_eval: without, p_single: one greedy judge; or a file of "
        "your own annotators (.json)")
    add("--flip", type=float, help="share of labels flipped (default: the pool's)")
    add("--out", type=Path, default=Path("annotated.json"), help="where the annotations go")
    add("--cache", type=Path, help="file of all answers (default: judge.jsonl beside --out)")
    add("--both_orders", action="store_true", help="ask for each pair twice, in both orders")
    add("--logprobs", action="store_true", help="fractions by log-probabilities, where the server gives them")
    add("--seed", type=int, default=0, help="of annotators, orders and flips")
    add("--seeds", type=int, default=1, help="label each pair so many times, by other annotators")
    add("--samples", choices=["all", "derangement"], default="all", help="of several outputs to one instruction: all "
        "pairs, or each with one other")
    add("--complete", default="", metavar="MODEL", help="have the instructions answered by this model, or serve:PATH")
    add("--limit", type=int, default=0, help="annotate only the first so many pairs (0: all)")
    add("--workers", type=int, default=8, help="requests under way at a time, at most")
    add("--max_unusable", type=float, default=.02, help="share of unusable verdicts that is put up with")
    add("--max_calls", type=int, help="stop before another call")
    add("--max_cost", type=float, metavar="$", help="stop when so much is spent")
    add("--price", default="", metavar="IN,OUT", help="$ per million tokens of prompt and completion")
    add("--dry_run", action="store_true", help="say what would be asked and what it costs, and ask nothing")
    add("--replay", action="store_true", help="only what the cache knows: no network, no key")
    args = parser.parse_args(underscored(argv))
    args.judge = args.judge_models or args.judge or ("barn" if args.pool in POOLS else args.pool)
    person = PERSON.fullmatch(args.judge)
    if args.flip and person:
        raise InputError("--flip would change nothing: a person's labels are not flipped")
    args.flip = POOLS.get(args.pool, 0.0) if args.flip is None and not person else args.flip or 0.0
    if not (0 <= args.flip <= .5 and 0 <= args.max_unusable <= 1):
        raise InputError("--flip lies between 0 and 0.5, --max_unusable between 0 and 1")
    if min(args.seeds, args.workers) < 1 or min(args.limit, args.max_calls or 0, args.max_cost or 0) < 0:
        raise InputError("--seeds and --workers are positive, --limit, --max_calls and --max_cost not negative")
    return args


def write(path, records):
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(records, indent=1))
    part.replace(path)


def answer(args):
    """Have instructions answered by the model args.complete."""
    if args.complete in CROWDS or PERSON.fullmatch(args.complete):
        raise InputError(f"--complete {args.complete}: that is a judge; name a model, or serve:PATH")
    records = read_records(args.pairs, ("instruction",))[:args.limit or None]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with connect(args.complete, args.cache or args.out.parent / "judge.jsonl", args.workers, replay=args.replay,
                 price=price_of(args.price), max_calls=args.max_calls, max_cost=args.max_cost) as judge:
        judge.knock()
        write(args.out, complete(records, args.complete, judge))
        print(f"{len(records)} answers are in {args.out}; {judge.calls} calls, {judge.spent()}")


def main(argv):
    args = parse(argv)
    if args.complete:
        return answer(args)
    pairs = read_pairs(args.pairs, args.reference, args.samples)[:args.limit or None]
    annotators = pool(args.judge, args.pool)
    price = price_of(args.price)
    if args.max_cost is not None and not all(price(annotator.model) for annotator in annotators):
        raise InputError("--max_cost needs the price of every model: --price IN,OUT, in $ per million tokens")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    offline = args.dry_run or args.replay
    with connect(args.judge, args.cache or args.out.parent / "judge.jsonl", args.workers, args.max_unusable,
                 replay=offline, price=price, max_calls=args.max_calls, max_cost=args.max_cost) as judge:
        if args.dry_run:
            records, questions = [], []
            for seed in range(args.seed, args.seed + args.seeds):
                more, asked = plan(pairs, annotators, seed, args.flip, args.both_orders)
                records, questions = records + more, questions + asked
            coins = sum(record["scored_by"] == "coin" for record in records)
            return print(f"{len(records)} labels, {coins} of them coins; {estimate(questions, judge, args.logprobs)}")
        judge.knock()
        records = [record for seed in range(args.seed, args.seed + args.seeds)
                   for record in annotate(pairs, annotators, judge, seed, args.flip, args.both_orders, args.logprobs,
                                          costs=True)]
        print(f"judge: {judge.calls} calls, {judge.spent()}")
    write(args.out, records)
    labels = np.array([record["preference"] for record in records], dtype=float).reshape(args.seeds, -1).T
    row = judge_report(labels, *([pair[key] for pair in pairs] for key in ("output_1", "output_2")))
    if args.seeds > 1:
        row["Agreement between annotators"] = 100 - row["Variance"]
    print(table(["", args.judge], *([key, number(value, "d" if isinstance(value, int) else ".2f")]
                                    for key, value in row.items() if value == value)))
    print(f"\n{len(records)} labels are in {args.out}")


if __name__ == "__main__":
    run(main, "annotate.py", "every answer is kept, and the same command goes on from there")
