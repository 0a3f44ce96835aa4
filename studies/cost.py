"""Cost: what do 1,000 labels cost, by pool of annotators and by model, beside people's $300?

Claim. AlpacaFarm (arXiv 2305.14387): people's labels cost $300 per 1,000, simulated ones of p_ann $6, which is 50 times
less; half of p_ann's labels are coins, so that it costs half as much as p_eval ($12; one greedy GPT-4 judge: $15.3). A
whole study, with 10,000 labels to learn from and 805 verdicts, costs $70 instead of $3,150.

How it is measured. The requests are those that annotate.py would send, with the prompts, batches and flips of each
pool, about pairs of answers: the reference answer to each instruction of eval and that to the next one, or --pairs
FILE. Nothing is sent. Four characters count as one token, each reply as long as it may be, and thoughts of a model that
thinks are not counted. Prices are those of data/judges/prices.json, one model for all annotators; --judge names another
one, or three for the big, the mid and the small annotators, and --price gives its price. The offline world's texts are
short: for AlpacaFarm's own give --data alpaca_farm, which downloads them once.

Cost: seconds; nothing is trained.

What would refute the claim: with no model of today does p_ann cost $6 or less.
"""
from dataclasses import dataclass

import annotate
from data import InputError
from data.alpaca_eval import question, read_pairs
from data.judges.prices import cost, price_of, prices
from data.judges.prompts import request_body
from rlhf import plan
from stats import plots
from stats.tables import table
from studies import kit

PEOPLE, PAPER = 300, {"p_ann": 6, "p_eval": 12, "p_single": 15.3}       # $ per 1,000 labels
LEARNED, JUDGED = 10_000, 805           # labels and verdicts of a whole study
TIERS = ("big", "mid", "small")         # of annotators
TOKEN = 4                               # characters


@dataclass
class Config(kit.Config):
    seeds: str = "0,1,2"                # each draws other annotators and other flips for every pair
    pairs: str = ""                     # a file of pairs to ask about (default: reference answers of eval)
    price: str = ""                     # $ per million tokens of prompt and of reply, as in 2.5,10 (default: the list)


def asked(pairs, kind, seed):
    """({tier: (tokens of prompts, of replies)}, number of coins, number of requests) of a pool for these pairs."""
    flip = annotate.POOLS[kind]
    records, questions = annotate.plan(pairs, annotate.pool(",".join(TIERS), kind), seed, flip)
    spent, groups = dict.fromkeys(TIERS, (0, 0)), annotate.batches(questions)
    for group in groups:
        body = request_body(group[0].annotator, [one.texts for one in group])
        prompt, reply = spent[body["model"]]
        size = sum(len(message["content"]) for message in body["messages"])
        spent[body["model"]] = prompt + size / TOKEN, reply + body["max_tokens"]
    return spent, sum(record["scored_by"] == "coin" for record in records), len(groups)


def per_thousand(pairs, kind, seeds):
    """The means over seeds, for 1,000 labels: {prompt, reply: {tier: tokens}, coins, requests}."""
    drawn = [asked(pairs, kind, seed) for seed in seeds]
    share = 1000 / len(pairs) / len(seeds)
    return {"prompt": {tier: share * sum(spent[tier][0] for spent, _, _ in drawn) for tier in TIERS},
            "reply": {tier: share * sum(spent[tier][1] for spent, _, _ in drawn) for tier in TIERS},
            "coins": share * sum(coins for _, coins, _ in drawn),
            "requests": share * sum(requests for *_, requests in drawn)}


def dollars(tokens, models, price):
    """$ for 1,000 labels with these tokens (see per_thousand), if `models` are the big, the mid and the small one."""
    return sum(cost(price(model), tokens["prompt"][tier], tokens["reply"][tier]) for tier, model in zip(TIERS, models))


def judges(said, price, given=""):
    """{name: its (big, mid, small) models}: of --judge, or, without one or with the offline world's, all models that
    have a price. given: what --price says."""
    if not said or said in annotate.CROWDS:
        if given:
            raise InputError("--price is the price of a model: name it with --judge MODEL")
        return {model: 3 * (model,) for model in prices() if model != "shutdown"}
    models = said.split(",")
    if len(models) not in (1, 3):
        raise InputError(f"--judge {said}: one model, or three (big,mid,small)")
    if unknown := [model for model in models if not price(model)]:
        raise InputError(f"the price of {unknown[0]} is not in data/judges/prices.json: give --price IN,OUT, in $ per "
                         "million tokens of prompt and of reply")
    return {said: tuple(models * 3)[:3]}


def run(cfg):
    common, price = kit.shared(cfg), price_of(cfg.price)
    pairs = read_pairs(cfg.pairs) if cfg.pairs else plan.trial_pairs(common.splits()["eval"])
    found = {kind: per_thousand(pairs, kind, cfg.numbers) for kind in annotate.POOLS}
    rows = []
    for name, models in judges(common.judge, price, cfg.price).items():
        each = {kind: dollars(tokens, models, price) for kind, tokens in found.items()}
        rows.append({"judge": name, **each, "times_cheaper": PEOPLE / each["p_ann"],
                     "study": (LEARNED * each["p_ann"] + JUDGED * each["p_eval"]) / 1000})
    rows.sort(key=lambda row: row["p_ann"])
    length = sum(len(question(pair) + pair["output_1"] + pair["output_2"]) for pair in pairs) / TOKEN / len(pairs)
    numbers = {"pairs": len(pairs), "tokens_of_a_pair": length, "tokens": found, "dollars": rows}
    svg = plots.bars({row["judge"]: (row["p_ann"], None) for row in rows}, "1,000 labels of p_ann", "$",
                     {"the paper's $6": PAPER["p_ann"]}, ".2f")
    return kit.Result(numbers, text_of(pairs, length, found, rows), {"cost": rows}, {"cost": svg})


def text_of(pairs, length, found, rows):
    """Tokens by pool, and dollars by model and pool."""
    tokens = [[kind, *(f"{x:,.0f}" for x in (each["requests"], each["coins"], sum(each["prompt"].values()),
                                             sum(each["reply"].values())))] for kind, each in found.items()]
    paper = ["the paper", *(f"{PAPER[kind]:.2f}" if kind in PAPER else "" for kind in found),
             f"{PEOPLE / PAPER['p_ann']:,.0f}", "70"]
    lines = [[row["judge"], *(f"{row[kind]:.2f}" for kind in found), f"{row['times_cheaper']:,.0f}",
              f"{row['study']:,.2f}"] for row in rows]
    cheap = sum(row["p_ann"] <= PAPER["p_ann"] for row in rows)
    return "\n\n".join([
        f"1,000 labels of {len(pairs)} pairs, each of about {length:.0f} tokens:",
        table(["", "requests", "coins", "prompt tokens", "reply tokens"], *tokens),
        f"$ per 1,000 labels; how many times cheaper p_ann is than people (${PEOPLE});\n$ for a study of {LEARNED:,} "
        f"labels of p_ann and {JUDGED} of p_eval:",
        table(["", *found, "times cheaper", "a study"], paper, *lines),
        f"With {cheap} of {len(rows)} p_ann costs the paper's ${PAPER['p_ann']} or less."])
