"""Preference pairs: sample answers of the SFT model in pairs and ask the simulated annotators which is better.

AlpacaFarm's p_sim^ann: a pool of annotators, one drawn for each pair, and a quarter of the labels flipped, which makes
simulated feedback as noisy as people's (arXiv 2305.14387, section 2.2). Pairs of equal texts are dropped.

--pairs.labels takes preferences that others have collected instead: those that AlpacaFarm released, or a file. They
need no judge, but their answers are not the SFT model's own.
"""
import json
import random
from dataclasses import dataclass

import torch

import annotate
from data import InputError, read_text, sets
from data.files import write_whole
from rlhf import config, policy
from rlhf.logprobs import lengths
from rlhf.sampler import generate
from rlhf.sft import cut_off

NEEDS = ("sft",)


def usual_flip(given):
    """{flip: its default} with these flags given. Only labels of p_eval are flipped; with flips it is p_sim^ann."""
    judge = given.get("judge") or ("barn" if given.get("data", "barn") == "barn" else "")
    pool = given.get("pool", config.Config.pool)
    return {"flip": annotate.usual_flip(judge, "p_ann" if pool == "p_eval" else pool)}


@dataclass
class Config(config.Config):
    pairs_per_prompt: int = 1           # pairs of answers to each instruction of the preference split
    max_pairs: int = 0                  # have only so many of the pairs labelled, drawn at random (0: all)
    flip: float = .25                   # share of labels flipped (barn: .18; its people, and other pools: 0)
    labels: str = ""                    # judge (default), a file, human (default for alpaca_farm), gpt4 or noisy

    LEAST = {"max_pairs": 0}
    BARN = {"pairs_per_prompt": 3}

    @classmethod
    def suits(cls, given):
        return usual_flip(given)

    def __post_init__(self):
        super().__post_init__()
        if self.flip > .5:
            raise InputError(f"--flip {self.flip} makes no sense: at 0.5 every label is a coin")
        self.labels = self.labels or ("human" if self.data == "alpaca_farm" else "judge")
        if (self.labels, self.judge) == ("judge", "none"):
            raise InputError("--judge none labels no pairs: name a judge, or labels that are there: --pairs.labels")

    @property
    def asks_judge(self):
        return self.labels == "judge"

    def reads(self):
        if not self.asks_judge:
            return {"labels": sets.preferences(self.labels)[:self.limit or None]}
        return super().reads() | ({"pool": read_text(self.pool)} if self.pool.endswith(".json") else {})

    def idle(self):
        trains = ("merge", "checkpointing", "micro_batch_tokens", "tensorboard")
        samples = ("flip", "pairs_per_prompt", "max_pairs", "seed", "slots", "device", "graph", "compile")
        found = super().idle() | dict.fromkeys(trains, "this stage trains nothing")
        found |= dict.fromkeys(config.OF_ANSWERS, "this stage answers nothing that is judged")
        if not self.asks_judge:
            found |= dict.fromkeys(samples, f"the labels are there already: {self.labels}")
        return found


def sample_pairs(cfg):
    """Pairs of different answers by the SFT model to the preference split: AlpacaFarm's records, and the token ids."""
    text = cfg.text()
    records = text.fitting(cfg.splits()["preference"], cfg.max_prompt_tokens)
    rows, logp = generate(policy.start(cfg), [text.prompt(record) for record in records], text, cfg, cfg.seed + 1,
                          2 * cfg.pairs_per_prompt, logps=True, kept="answers")
    pairs = []
    for i, record in enumerate(records):
        for j in range(cfg.pairs_per_prompt):
            start = 2 * (i * cfg.pairs_per_prompt + j)
            (_, one), (_, two) = rows[start:start + 2]
            pairs.append({"instruction": record["instruction"], "input": record["input"], "seed": f"/{j}",
                          "output_1": text.decode(one), "output_2": text.decode(two), "ids_1": one, "ids_2": two})
            if logp:
                pairs[-1] |= {"logp_1": logp[start].sum().item(), "logp_2": logp[start + 1].sum().item()}
    return drawn(different(pairs, "output"), cfg.max_pairs, cfg.seed)


def released(cfg):
    """Pairs that others have labelled, their answers as tokens."""
    text = cfg.text()
    pairs = text.fitting(sets.preferences(cfg.labels)[:cfg.limit or None], cfg.max_prompt_tokens)
    responses = cut_off([text.example(pair, pair[f"output_{i}"])[1] for pair in pairs for i in "12"], cfg, "answers")
    for pair, one, two in zip(pairs, responses[::2], responses[1::2]):
        pair |= {"ids_1": one, "ids_2": two}
        for name in ("logp_1", "logp_2"):               # another run's pairs have those of its own model
            pair.pop(name, None)
    return different(pairs, "ids")


def different(pairs, key):
    """The pairs whose two answers differ. Prints how many do not."""
    kept = [pair for pair in pairs if pair[f"{key}_1"] != pair[f"{key}_2"]]
    if len(kept) < len(pairs):
        print(f"{len(pairs) - len(kept)} of {len(pairs)} pairs have two equal answers and are left out")
    return kept


def drawn(pairs, most, seed):
    """At most `most` of the pairs (0: all), drawn at random, in their order. Fewer pairs are a part of more."""
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    return [pairs[i] for i in sorted(order[:most or None])]


def label(cfg):
    """(pairs in which the judge prefers one answer, how many pairs it was asked about)."""
    sampled = cfg.dir() / "unlabelled.json"
    if not sampled.exists():            # if the judge fails, the same pairs are used in the next attempt
        write_whole(sampled, [json.dumps(sample_pairs(cfg)).encode()])
    with annotate.connect(cfg.judge, cfg.judge_cache, **annotate.options(cfg)) as judge:
        pairs = annotate.annotate(json.loads(sampled.read_text()), annotate.pool(cfg.judge, cfg.pool), judge, cfg.seed,
                                  cfg.flip)
    asked = sum(pair["scored_by"] not in ("coin", "equal") for pair in pairs)
    decided = [pair for pair in pairs if pair["preference"] not in (None, 1.5)]
    if len(decided) < len(pairs):
        print(f"{len(pairs) - len(decided)} of {len(pairs)} pairs are ties or have no usable verdict: left out")
    return [{**pair, "preference": round(pair["preference"])} for pair in decided], asked   # p_pairwise gives fractions


def run(cfg):
    pairs, asked = label(cfg) if cfg.labels == "judge" else (released(cfg), 0)
    if not pairs:
        raise InputError("no pair of different answers has a usable preference: raise --limit or --temperature")
    lines = ",\n".join(map(json.dumps, pairs))          # with indent=1, each token id would have a line of its own
    write_whole(cfg.dir() / "pairs.json", [f"[{lines}]".encode()])
    found = {"pairs": len(pairs), "first_preferred": sum(pair["preference"] == 1 for pair in pairs) / len(pairs)}
    coins = {"coins": sum(pair["scored_by"] == "coin" for pair in pairs)} if cfg.asks_judge else {}
    return found | coins | {"judge/asked": asked}


def labelled(cfg):
    return json.loads((cfg.dir("pairs") / "pairs.json").read_text())


def load_pairs(cfg, text):
    """The pairs of the run: N times (chosen row, rejected row), each row (prompt ids, response ids). Responses are the
    ids that were sampled, not their text encoded again."""
    pairs = []
    for pair in labelled(cfg):
        prompt = text.prompt(pair)
        one, two = (prompt, pair["ids_1"]), (prompt, pair["ids_2"])
        pairs.append((one, two) if pair["preference"] == 1 else (two, one))
    return pairs


def sampled_logps(cfg):
    """Log-probs (2, N) of the answers in load_pairs(), which were computed when the model that learning starts from
    sampled them; None if it did not, or in 16 bits."""
    pairs = labelled(cfg)
    if any("logp_1" not in pair for pair in pairs):
        return None
    both = torch.tensor([[pair["logp_1"], pair["logp_2"]] for pair in pairs])                # (N, 2)
    second = torch.tensor([[pair["preference"] == 2] for pair in pairs])                     # (N, 1)
    return torch.where(second, both.flip(1), both).T


def rows_of(pairs):
    """The 2N rows of N pairs: all chosen ones, then all rejected ones."""
    return [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]


def pair_lengths(pairs):
    """Tokens that each pair takes as two rows of one batch: a list (N,)."""
    return [2 * max(lengths(pair)) for pair in pairs]
