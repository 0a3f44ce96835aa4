"""The simulated annotators: pairs of answers in, preferences out, by LLM judges over raw HTTP.

    python annotate.py PAIRS.json --pool p_ann --judge MODEL --out ANNOTATED.json
    python annotate.py OUTPUTS.json --reference REF.json --pool p_eval --judge big,mid,small --dry_run
    python annotate.py INSTRUCTIONS.json --complete MODEL --out OUTPUTS.json            answers instead of labels

A pool of annotators stands for a crowd, and labels flipped on purpose for its disagreement (AlpacaFarm, arXiv
2305.14387): p_ann is the pool with a quarter of the labels flipped, p_eval the pool without, p_single one greedy judge
that sees five pairs at a time, p_pairwise one that says one letter, with the log-probabilities of its token.
The judge is any server that speaks OpenAI's chat completions, at OPENAI_BASE_URL with OPENAI_API_KEY; "barn",
"barn-human" and "barn-far" are the offline world's, "serve:PATH" is a checkpoint on this machine, "me" is you, on a
page or in a notebook. How they are asked is in data/judges/.
"""
import contextlib
import datetime
import itertools
import statistics
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import InputError, run
from data.alpaca_eval import draw, question, read_pairs
from data.files import write_json
from data.flags import Parser, location
from data.judges import JudgeError
from data.judges.answers import complete
from data.judges.client import MOST_ROOM, NO_MESSAGE, Judge, shorten
from data.judges.person import PERSON, Person
from data.judges.pools import read_pool
from data.judges.prices import dollars, forecast, price_of, prices
from data.judges.prompts import (FORMS, Annotator, once_more, pairwise, paper_pool, prompts_shown, request_body,
                                 single, template)
from data.judges.servers import add_flags, at_home, fingerprint, options, remote, served
from data.judges.verdicts import content, verdicts, without_thought
from data.sets import check_target, read_records
from stats.agreement import judge_report
from stats.tables import number, table

# The offline world's: their names, how many (as in the paper), and the share of labels that p_ann flips. With it,
# simulated annotators agree with people, and vary, nearly as people do; people make mistakes of their own.
CROWDS = {"barn": ("barn-sim", 13, .18), "barn-human": ("barn-human", 16, 0.0), "barn-far": ("barn-far", 16, 0.0)}
POOLS = {"p_ann": .25, "p_eval": 0.0, "p_single": 0.0, "p_pairwise": 0.0}   # name: share of labels that are flipped
EARLY = 15                                              # pairs, asked twice: without any verdict the judge is given up
SOON = 60                                               # days before a model's shutdown in which that is said


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
        prefix, size, _ = CROWDS[judge]
        names = [f"{prefix}-{i:02d}" for i in range(size if kind in ("p_ann", "p_eval") else 1)]
        return [Annotator(name, name) for name in names]
    models = judge.split(",")
    if len(models) not in (1, 3) or not all(models):
        raise InputError(f"--judge {judge}: one model, or three (big,mid,small)")
    return {"p_single": single(models[0]), "p_pairwise": pairwise(models[0])}.get(kind) or paper_pool(models)


def usual_flip(judge, kind):
    """The share of a judge's labels that a pool flips unless another one is given; `kind` as for pool()."""
    if judge in CROWDS and kind == "p_ann":
        return CROWDS[judge][-1]
    return 0.0 if PERSON.fullmatch(judge) else POOLS.get(kind, 0.0)


# ---- pairs -> preferences ------------------------------------------------------------------------------

class Question:
    """One pair to be asked in one order, and the record it belongs to."""

    def __init__(self, record, annotator, switched, salt):
        self.record, self.annotator, self.switched, self.salt = record, annotator, switched, salt
        first, second = ("output_2", "output_1") if switched else ("output_1", "output_2")
        self.texts = question(record), record[first], record[second]
        self.body, self.answer, self.preference, self.cause = {}, {}, None, ""      # the latest
        self.share, self.replies = 1, []                # pairs in its request; (line, pairs in its request) of all

    @property
    def form(self):
        return template(self.annotator.prompt)["verdict"]

    @property
    def said(self):
        """The latest reply as text, None if there is none."""
        return content(self.answer["choice"]["message"]) if "choice" in self.answer else None


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


def requests_of(groups, judge, logprobs=False):
    """The request for each group of questions. Log-probabilities say something of a single letter only, for which a
    model need not think long."""
    bodies = []
    for group in groups:
        letter = group[0].form == "letter"
        body = request_body(group[0].annotator, [one.texts for one in group],
                            logprobs=letter and (logprobs or group[0].annotator.logprobs))
        effort = {"reasoning_effort": judge.brief} if letter and judge.brief else {}
        bodies.append({**body, **effort, **judge.extra})
    return bodies


def second_request(one, judge, logprobs):
    """The request for a pair that has got no verdict: the form said again, more room, or the pair without company."""
    if one.cause == "no verdict" and one.share == 1:
        return once_more(one.body, without_thought(one.said)[0], one.form)
    (body,) = requests_of([[one]], judge, logprobs)
    if one.cause == "no verdict":
        return once_more(body, "", one.form)
    return {**body, "max_tokens": max(MOST_ROOM, body["max_tokens"])} if one.cause == "cut off" else body


def ask(groups, judge, bodies, total):
    """Ask the judge about groups of questions in these requests, and file in each question what came of it."""
    for group, body, line in zip(groups, bodies, judge.complete(bodies, total)):
        found = verdicts(group[0].annotator, line.get("choice"), len(group), line.get("cause"), line.get("usage"))
        for one, (preference, cause) in zip(group, found):
            one.body, one.answer, one.share, one.cause = body, line, len(group), cause
            one.replies.append((line, len(group)))
            one.preference = 3 - preference if preference and one.switched else preference


def settle(groups, judge, logprobs, total):
    """Ask about groups of the `total` questions, and once more about each without a verdict; the hits in the cache."""
    if isinstance(judge, Person):
        # In both orders: each pair in the drawn one first, and in the other after all of them.
        judge.answer(sorted((one for group in groups for one in group), key=lambda one: one.switched != draw(
            "is_switched_outputs", one.salt, [False, True])))
        return judge.hits
    ask(groups, judge, requests_of(groups, judge, logprobs), total)
    hits, twice = judge.hits, ("no verdict", "cut off", NO_MESSAGE)
    failed = [[one] for group in groups for one in group if one.cause in twice or one.cause and one.share > 1]
    if failed:
        ask(failed, judge, [second_request(one, judge, logprobs) for (one,) in failed], total)
    failed = [[one] for group in groups for one in group if one.cause]
    if failed and judge.ask_again:
        bodies = [one.body for (one,) in failed]
        judge.cache.forget(map(judge.name, bodies))
        ask(failed, judge, bodies, total)
    return hits


def probe(judge, annotators, pairs, logprobs=False, **order):
    """Ask each model of a pool the first real questions for it, before an hour of work or a bill depends on it.

    What it answers is kept, so `annotate` with the same `order` (seed, flip, both_orders) does not ask again.
    JudgeError if it is not there, or cannot answer in form. Says which model is shut down soon.
    """
    listed = judge.knock()
    if isinstance(judge, Person) or judge.endpoint == "barn" or judge.replay:
        return
    shutdown, (_, questions) = {**prices()["shutdown"], **listed}, plan(pairs, annotators, **order)
    for model, group in {group[0].annotator.model: group for group in reversed(batches(questions))}.items():
        if (day := shutdown.get(model)) and (day - datetime.date.today()).days < SOON:
            print(f"judge: {model} is shut down on {day}", flush=True)
        settle([group], judge, logprobs, len(group))
        if all(one.cause for one in group):
            unusable(group, judge, len(group), len(group))


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
    verdict is asked about once more: alone if it had company, with room for a longer answer if that was cut off, else
    with the form said again. JudgeError if more than judge.max_unusable of those asked have no usable verdict, or none
    of the first EARLY.
    """
    records, questions = plan(pairs, annotators, seed, 0 if isinstance(judge, Person) else flip, both_orders)
    for record in records:
        record |= {"judge": judge.title, "pool": annotators[0].pool, "effort": judge.effort, "date": None}
    groups = batches(questions)
    early = 1 + sum(total < EARLY for total in itertools.accumulate(map(len, groups)))
    early = len(groups) if isinstance(judge, Person) else early
    hits = settle(groups[:early], judge, logprobs, len(questions))
    failed = [one for group in groups[:early] for one in group if one.cause]
    if len(groups) > early and len(failed) == sum(map(len, groups[:early])):
        unusable(failed, judge, len(failed), len(failed))
    hits += settle(groups[early:], judge, logprobs, len(questions))

    by_record = {}
    for one in questions:
        by_record.setdefault(id(one.record), []).append(one)
    lost = Counter()
    for said in by_record.values():
        record, causes = said[0].record, [one.cause for one in said if one.cause]
        texts = [one.said for one in said]
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
            replies = [reply for one in said for reply in one.replies]
            paid = [(dollars(usage, judge.price(said[0].annotator.model)), share) for line, share in replies
                    for usage in (*line.get("before", ()), line.get("usage"))]
            known = all(each is not None for each, share in paid)
            record["price_per_example"] = sum(each / share for each, share in paid) if known else None
            record["time_per_example"] = sum(line.get("seconds", 0) / share for line, share in replies)
        lost.update(causes[:1])
    report(records, questions, judge, len(groups), hits, lost)
    return records


def report(records, questions, judge, requests, hits, lost):
    """Say what was asked and what came of it; JudgeError if too little did."""
    asked = sum(record["scored_by"] not in ("coin", "equal") for record in records)
    kinds = Counter(record["scored_by"] for record in records)
    failed = sum(lost.values())
    causes = ", ".join(f"{n} {cause}" for cause, n in lost.most_common())
    line = (f"judge: {asked} asked{f' in {requests} requests' if requests != asked else ''} ({hits} from the cache), "
            f"{asked - failed} usable, {failed} unusable{f' ({causes})' if causes else ''}, {kinds['coin']} coins, "
            f"{kinds['equal']} identical{f', {soft} by log-probabilities' if (soft := kinds['logprobs']) else ''}")
    print(textwrap.fill(line, 80, subsequent_indent="  "), flush=True)
    if any("logprobs" in one.body for one in questions) and not soft:
        print("judge: no log-probabilities of a letter came: these are verdicts by text", flush=True)
    unusable([one for one in questions if one.cause], judge, failed, asked)


def unusable(lost, judge, failed, asked):
    """JudgeError if too many verdicts are unusable: which annotator wanted which form, and what came."""
    if failed > judge.max_unusable * asked:
        one = lost[0]
        came = shorten(one.said or one.answer.get("fault") or one.cause)
        raise JudgeError(f"{failed} of {asked} verdicts are unusable, for example {came!r} ({one.cause}), where "
                         f"{one.annotator.name} wants {FORMS[one.form]}; at most {judge.max_unusable:.0%} may be "
                         f"(--max_unusable). Every answer is kept in {judge.cache.path}; --ask_again unusable asks a "
                         "judge that is well again for these")


# ---- finding the judge ---------------------------------------------------------------------------------

@contextlib.contextmanager
def connect(judge, cache, workers=8, max_unusable=0.02, **options):
    """The Judge behind a name; `cache` is the path of the file of its answers, `options` are Judge's.

    "barn", "barn-human" and "barn-far" start the offline world's server, "serve:PATH" serves the checkpoint or run
    folder at PATH, any other is a model at OPENAI_BASE_URL (AZURE_OPENAI_ENDPOINT), asked with OPENAI_API_KEY
    (AZURE_OPENAI_API_KEY).
    """
    with contextlib.ExitStack() as stack:
        if PERSON.fullmatch(judge):
            clicks, replay = Path(cache).with_name("me.jsonl"), options.get("replay", False)
            yield stack.enter_context(contextlib.closing(Person(judge, clicks, replay, max_unusable)))
            return
        if judge in CROWDS:
            from data.barn.judge import serve  # real judges do without the offline world
            where = {"base_url": stack.enter_context(serve()), "endpoint": "barn"}
        elif judge.startswith("serve:"):
            where = {"base_url": stack.enter_context(served(judge)), "endpoint": fingerprint(judge[6:])}
        else:
            where = remote(options.get("replay")) | {"brief": "none"}
        found = stack.enter_context(contextlib.closing(
            Judge(cache=cache, workers=workers, max_unusable=max_unusable, **where, **options)))
        found.title = judge
        yield found


def estimate(questions, judge, logprobs):
    """What asking would take, as text."""
    if isinstance(judge, Person):
        return judge.estimate(questions)
    groups = batches(questions)
    bodies = requests_of(groups, judge, logprobs)
    new = [(group, body) for group, body in zip(groups, bodies) if not judge.cache.get(judge.name(body))]
    alone = requests_of([[one] for group, _ in new for one in group], judge, logprobs)
    first = {judge.name(body): body for _, body in new}.values()
    return (f"{len(questions)} questions in {len(bodies)} requests, {len(bodies) - len(new)} of them in the cache; "
            f"the others {forecast(first, 2 * [*first, *alone], MOST_ROOM, judge.price)}")


# ---- the command ---------------------------------------------------------------------------------------

def parse(argv):
    parser = Parser("annotate.py", __doc__)
    add = parser.add
    add("pairs", help="pairs {instruction, output_1, output_2}, lists of outputs, or outputs with --reference; .json, "
        ".jsonl, .gz")
    add("--reference", default="", metavar="FILE", help="what the outputs are compared with: output_1 of the pairs")
    add("--judge", default="", metavar="MODEL", help="a model, big,mid,small, serve:PATH, or for texts of the "
        "offline world barn (default), barn-human, barn-far; me: a page asks you")
    add("--judge_models", default="", metavar="BIG,MID,SMALL", help="the same as --judge")
    add("--pool", default="p_ann", help="p_ann: thirteen with flips, p_eval: without, p_single: one that sees five "
        "pairs at a time, p_pairwise: one letter a pair; or a file of your own annotators (.json)")
    add("--flip", type=float, help="share of labels flipped (default: the pool's)")
    add("--out", type=location, default=Path("annotated.json"), help="where the annotations go")
    add("--cache", type=location, help="file of all answers (default: judge.jsonl beside --out)")
    add("--both_orders", action="store_true", help="ask for each pair twice, in both orders")
    add("--logprobs", action="store_true", help="fractions by the log-probabilities of a single letter")
    add("--seed", type=int, default=0, help="of annotators, orders and flips")
    add("--seeds", type=int, default=1, help="label each pair so many times, by other annotators")
    add("--samples", choices=["all", "derangement"], default="all", help="of several outputs to one instruction: all "
        "pairs, or each with one other")
    add("--complete", default="", metavar="MODEL", help="have the instructions answered by this model, or serve:PATH")
    add("--limit", type=int, default=0, help="annotate only the first so many pairs (0: all)")
    add_flags(add)
    add("--max_calls", type=int, help="stop before another call")
    add("--max_cost", type=float, metavar="$", help="stop when so much is spent")
    add("--price", default="", metavar="IN,OUT", help="$ per million tokens of prompt and completion")
    add("--dry_run", action="store_true", help="say what would be asked and what it costs, and ask nothing")
    add("--show_prompt", default="", metavar="NAME", help="print what this annotator is asked about the first pair")
    add("--replay", action="store_true", help="only what the cache knows: no network, no key")
    args = parser.parse(argv)
    args.judge = args.judge_models or args.judge or ("" if args.pool in POOLS else args.pool)
    person = PERSON.fullmatch(args.judge)
    if args.flip and person:
        raise InputError("--flip would change nothing: a person's labels are not flipped")
    if not 0 <= (args.flip or 0) <= .5:
        raise InputError("--flip lies between 0 and 0.5")
    if not 1 <= args.seeds <= 1000 or not all(x >= 0 for x in (args.limit, args.max_calls or 0, args.max_cost or 0)):
        raise InputError("--seeds lies between 1 and 1000, --limit, --max_calls and --max_cost are not negative")
    args.options = {**options(args), "replay": args.dry_run or args.replay, "max_calls": args.max_calls,
                    "max_cost": args.max_cost, "price": price_of(args.price)}
    return args


def answer(args):
    """Have instructions answered by the model args.complete."""
    if args.complete in CROWDS or PERSON.fullmatch(args.complete):
        raise InputError(f"--complete {args.complete}: that is a judge; name a model, or serve:PATH")
    records = read_records(args.pairs, ("instruction",), ("dataset",))[:args.limit or None]
    check_target(args.out, ("output", "generator"), [args.pairs])
    with connect(args.complete, args.cache or args.out.parent / "judge.jsonl", **args.options) as judge:
        judge.knock()
        write_json(args.out, complete(records, args.complete, judge))
        print(f"{len(records)} answers are in {args.out}; {judge.calls} calls, {judge.spent()}")


def main(argv):
    args = parse(argv)
    if args.complete:
        return answer(args)
    pairs = read_pairs(args.pairs, args.reference, args.samples)[:args.limit or None]
    args.judge = args.judge or at_home(pairs)
    args.flip = usual_flip(args.judge, args.pool) if args.flip is None else args.flip
    annotators = pool(args.judge, args.pool)
    texts = [(question(pair), pair["output_1"], pair["output_2"]) for pair in pairs[:1]]
    if args.show_prompt:
        return print(prompts_shown(annotators, texts, args.show_prompt))
    if args.max_cost is not None and not all(args.options["price"](annotator.model) for annotator in annotators):
        raise InputError("--max_cost needs the price of every model: --price IN,OUT, in $ per million tokens")
    check_target(args.out, ("annotator", "scored_by"), filter(None, [args.pairs, args.reference]))
    with connect(args.judge, args.cache or args.out.parent / "judge.jsonl", **args.options) as judge:
        if args.dry_run:
            records, questions = [], []
            for seed in range(args.seed, args.seed + args.seeds):
                more, asked = plan(pairs, annotators, seed, args.flip, args.both_orders)
                records, questions = records + more, questions + asked
            coins = sum(record["scored_by"] == "coin" for record in records)
            shown = "" if isinstance(judge, Person) else prompts_shown(annotators, texts)
            asked = estimate(questions, judge, args.logprobs)
            return print("\n".join(filter(None, (f"{len(records)} labels, {coins} of them coins; {asked}", shown))))
        probe(judge, annotators, pairs, args.logprobs, seed=args.seed, flip=args.flip, both_orders=args.both_orders)
        records = [record for seed in range(args.seed, args.seed + args.seeds)
                   for record in annotate(pairs, annotators, judge, seed, args.flip, args.both_orders, args.logprobs,
                                          costs=True)]
        print(f"judge: {judge.calls} calls, {judge.spent()}")
    write_json(args.out, records)
    labels = np.array([record["preference"] for record in records], dtype=float).reshape(args.seeds, -1).T
    row = judge_report(labels, *([pair[key] for pair in pairs] for key in ("output_1", "output_2")))
    if args.seeds > 1:
        row["Agreement between annotators"] = 100 - row["Variance"]
    print(table(["", args.judge], *([key, number(value, "d" if isinstance(value, int) else ".2f")]
                                    for key, value in row.items() if value == value)))
    print(f"\n{len(records)} labels are in {args.out}")


if __name__ == "__main__":
    run(main, "annotate.py", "every answer is kept, and the same command goes on from there")
