"""[kit] Rewards: what --reward chooses, as a function of rows [(prompt ids, response ids)] -> scores (B,).

model: the reward model of the run, which is trained only for this choice.
rule: 1 or 0, by what can be checked exactly (learning from verifiable rewards). In the offline world: how many things
the answer names, their category, facts, steps and words, and that the text is complete. For records of a file: whether
the last number of the answer is the last number under `answer` in the record, as in GSM8K and in countdown.
true: the hidden true reward of the offline world, an upper bound for what feedback about it can teach.
judge: 1 if the annotators prefer the answer to the SFT model's, 0 if not, 0.5 if the two are equal.
FILE.py:function: a function (instruction, output) -> float in a file of your own.
A reward model that exists already: a folder or a name on the hub, a ...ForSequenceClassification with one label, as
--merge writes it too; or the stage `reward` of another run. It reads texts with its own tokenizer and chat template, so
it may be of another family than the policy. Its scores are not rescaled: choose --kl_coef and penalties to fit them.
"""
import contextlib
import math
import re
import runpy
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

import annotate
from data import InputError, one_of, read_text
from data.alpaca_eval import question
from data.barn import reward as barn_reward
from data.barn.reward import correct, true_reward
from data.judges.person import PERSON
from data.progress import Progress
from rlhf import config, reward
from rlhf.answers import questions
from rlhf.pairs import usual_flip
from rlhf.sampler import generate

WORDS = ("model", "rule", "true", "judge")
NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass
class Config(config.Config):
    """The flags that methods with a choice of rewards share."""
    reward: str = "model"               # model, rule, true (barn), judge, FILE.py:function, or a reward model's name
    flip: float = .25                   # share of labels flipped (barn: .18; its people, and other pools: 0)

    @classmethod
    def suits(cls, given):
        return usual_flip(given)

    def __post_init__(self):
        super().__post_init__()
        self.reward = self.reward.removeprefix("https://huggingface.co/")
        if ".py" not in self.reward and not self.ready_made:
            one_of("--reward", self.reward, (*WORDS, "FILE.py:function", "ORG/NAME", "FOLDER"))
        if self.reward == "true" and self.data != "barn":
            raise InputError(f"--reward true: only the offline world has a true reward, and {self.data} has none")
        if (self.reward, self.judge) == ("judge", "none"):
            raise InputError("--judge none prefers no answer: name a judge, or another --reward")
        if self.flip > .5:
            raise InputError(f"--flip {self.flip} makes no sense: at 0.5 every label is a coin")

    @property
    def asks_judge(self):
        return self.reward == "judge"

    @property
    def ready_made(self):
        """Whether --reward names a reward model that is there already."""
        if self.reward in WORDS:
            return False
        return Path(self.reward).is_dir() or "/" in self.reward and ".py" not in self.reward

    def unneeded(self):
        return super().unneeded() + (() if self.reward == "model" else ("reward",))

    def reads(self):
        """{flag: content or folder} of what the reward reads. InputError if it cannot be used, before any training."""
        if self.ready_made:
            return {"reward": reward.examined(self.reward)}
        if self.reward == "rule":
            for record in self.splits()["unlabeled"]:
                of_text(self)(record, "")
        if self.asks_judge and self.pool.endswith(".json"):
            return super().reads() | {"pool": read_text(self.pool)}
        if self.reward in ("true", "rule") and self.data == "barn":
            return {"reward": Path(barn_reward.__file__).read_text(encoding="utf-8")}
        if ".py" not in self.reward:
            return super().reads()
        of_text(self)
        return {"reward": read_text(self.reward.rpartition(":")[0])}

    def idle(self):
        if PERSON.fullmatch(self.judge):
            return super().idle() | {"flip": "a person's labels are not flipped"}
        return super().idle() | ({} if self.asks_judge else {"flip": f"--reward {self.reward} asks no judge"})


# -- rewards of texts ----------------------------------------------------------------------------------------------

def last_number(text):
    """The last number in a text; None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def same_number(record, output):
    """1 if the last number of the output is the last one of the record's answer, else 0."""
    answer = last_number(str(record.get("answer", "")))
    if answer is None:
        raise InputError(f"--reward rule needs a number under 'answer' in each record: {question(record)[:60]!r} "
                         "has none")
    return float(last_number(output) == answer)


def own_function(said):
    """FILE.py:function as a function (record, output) -> float; InputError if there is no such function."""
    file, _, name = said.rpartition(":")
    if not file.endswith(".py"):
        raise InputError(f"--reward {said} names no function: give it as in {said}:function")
    try:
        function = runpy.run_path(file).get(name)
    except OSError as error:
        raise InputError(f"--reward {said}: {error.strerror or error}") from None
    except (Exception, SystemExit) as error:            # whatever the user's own code raises
        raise InputError(f"--reward {said}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise InputError(f"--reward {said}: {file} has no function {name!r}")

    def worth(record, output):
        try:
            value = float(function(question(record), output))
            if not math.isfinite(value):
                raise ValueError(f"{value} is no reward")
            return value
        except (Exception, SystemExit) as error:
            raise InputError(f"--reward {said}: {type(error).__name__}: {error}, "
                             f"of the answer {output[:60]!r}") from None
    return worth


def of_text(cfg):
    """The reward of a text: a function (record, output) -> float."""
    if cfg.reward == "true":            # mean 0 and deviation 1, roughly, over demonstrations, so that --kl_coef fits
        return lambda record, output: (true_reward(question(record), output) - 7) / 2
    if cfg.reward == "rule" and cfg.data == "barn":
        return lambda record, output: float(correct(question(record), output))
    return same_number if cfg.reward == "rule" else own_function(cfg.reward)


def records_of(cfg, text, ref):
    """{prompt ids: record} of the splits whose prompts are answered."""
    splits = cfg.splits()
    found = {tuple(text.prompt(record)): record for split in ("val", "preference", "unlabeled")
             for record in splits[split]}
    records, prompts = questions(ref, text, cfg)        # of the eval split, where too long ones are cut
    return {tuple(prompt): record for record, prompt in zip(records, prompts)} | found


# -- the annotators ------------------------------------------------------------------------------------------------

class Annotators:
    """Asks the annotators of the run which of two rows is better. The connection ends when this object is deleted."""

    def __init__(self, cfg, text, records):
        self.cfg, self.text, self.records = cfg, text, records
        self.pool = annotate.pool(cfg.judge, cfg.pool)
        self.pairs = self.asked = self.cost = 0         # cost: $; None if a price is not known
        stack = contextlib.ExitStack()
        self.judge = stack.enter_context(annotate.connect(cfg.judge, cfg.judge_cache, price=annotate.price_of(),
                                                          **annotate.options(cfg)))
        weakref.finalize(self, stack.close)
        # one annotate() asks about few pairs: the limit on unusable verdicts is for the run as a whole
        self.lost, self.allowed, self.judge.max_unusable = 0, cfg.max_unusable, 1.

    def state_dict(self):
        return {name: getattr(self, name) for name in ("pairs", "asked", "cost", "lost")}

    def load_state_dict(self, state):
        vars(self).update(state)

    def __call__(self, ones, twos):
        """Preferences (B,) between the rows `ones` (1) and the rows `twos` (2) of the same prompts: a fraction if the
        judge gives its probabilities, 1.5 if the texts are equal or no verdict is usable. JudgeError above
        --max_unusable."""
        pairs = []
        for (prompt, one), (_, two) in zip(ones, twos):
            record, self.pairs = self.records[tuple(prompt)], self.pairs + 1
            pairs.append({"instruction": record["instruction"], "input": record.get("input", ""),
                          "output_1": self.text.decode(one), "output_2": self.text.decode(two),
                          "seed": f"/{self.pairs}"})    # so that the annotator is drawn anew for each pair
        Progress.close()
        labelled = annotate.annotate(pairs, self.pool, self.judge, self.cfg.seed, self.cfg.flip, costs=True)
        costs = [record["price_per_example"] for record in labelled if record["scored_by"] not in ("coin", "equal")]
        self.cost = None if None in (self.cost, *costs) else self.cost + sum(costs)
        self.asked += len(costs)
        self.lost += sum(record["preference"] is None for record in labelled)
        if self.lost > self.allowed * max(self.asked, 500):
            raise annotate.JudgeError(f"{self.lost} of {self.asked} verdicts are unusable (--max_unusable)")
        return [record["preference"] or 1.5 for record in labelled]

    def spent(self):
        """Metrics: the number of labels that were asked for so far, and what they cost in $."""
        return {"judge/asked": self.asked, "judge/cost": self.cost}


class AgainstSFT:
    """The reward of an answer: 1 if the annotators prefer it to one of the SFT model, which is sampled once for each
    prompt, 0 if not, 0.5 for a draw, a fraction if the judge gives its probabilities."""

    def __init__(self, annotators, ref, text, cfg):
        self.annotators, self.ref, self.text, self.cfg = annotators, ref, text, cfg
        self.theirs = {}                                # {prompt ids: row of the SFT model}

    def state_dict(self):
        return {"annotators": self.annotators.state_dict(), "theirs": list(self.theirs.values())}

    def load_state_dict(self, state):
        self.annotators.load_state_dict(state["annotators"])
        self.theirs = {tuple(prompt): (prompt, response) for prompt, response in state["theirs"]}

    def __call__(self, rows):
        new = [prompt for prompt in dict.fromkeys(tuple(prompt) for prompt, _ in rows) if prompt not in self.theirs]
        asked, seed = [list(prompt) for prompt in new], self.cfg.seed * 100_003 + 100_000
        if new:
            self.theirs.update(zip(new, generate(self.ref, asked, self.text, self.cfg, seed)))
        preferences = self.annotators(rows, [self.theirs[tuple(prompt)] for prompt, _ in rows])
        return 2. - torch.tensor(preferences, dtype=torch.float)


# -- reward models that are there already --------------------------------------------------------------------------

class ReadyMade:
    """The reward model that --reward names, as a reward of rows, rows -> scores (B,), or of texts: scores().

    text: the tokenizer and prompts of the policy. records: {prompt ids: record}. Both are needed for rows only: answers
    are decoded with the policy's tokenizer and encoded again with that of the reward model, `own`. warned: whether the
    warning has been printed.
    """

    def __init__(self, cfg, text=None, records=()):
        self.cfg, self.text, self.records, self.warned = cfg, text, records, False
        self.model, self.own, self.trained_here = reward.open_model(cfg.reward, cfg)

    def __call__(self, rows):
        return self.scores([self.translated(self.records[tuple(prompt)], response) for prompt, response in rows])

    def translated(self, record, response):
        """An answer in tokens of the policy as tokens() of the reward model; one that was cut off has no EOS."""
        ended = response[-1] in self.text.stops
        return self.tokens(record, self.text.decode(response[:-1] if ended else response), ended)

    def scores(self, texts):
        """The scores (B,) of prompts with their answers, as tokens() returns them."""
        longest = self.model.gpt.config.max_position_embeddings
        long = sum(len(ids) > longest for ids in texts)
        if long and not self.warned:
            Progress.close()
            print(f"{long} of {len(texts)} answers are too long for the reward model: it reads {longest} tokens,\n"
                  "so the middle of prompt and answer is left out", flush=True)
            self.warned = True
        texts = [without_middle(ids, longest) for ids in texts]
        return reward.scores(self.model, [(ids[:-1], ids[-1:]) for ids in texts], self.cfg)

    def tokens(self, record, output, ended=True):
        """Token ids of prompt and answer, written as in the reward model's training.

        A model from elsewhere with a chat template gets the whole chat, in which the turn of the answer is closed. Any
        other one gets the prompt and the answer, with EOS if the answer ended.
        """
        if self.own.template and not self.trained_here:
            turns = {"user": question(record), "assistant": output}
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            return self.own.encode(self.own.chat(messages, add_generation_prompt=False))
        prompt, answer = self.own.example(record, output)
        return prompt + (answer if ended else answer[:-1])


def without_middle(ids, longest):
    """At most `longest` of the ids, from both ends: if longest is 5, the first 2 and the last 3."""
    return ids if len(ids) <= longest else ids[:longest // 2] + ids[longest // 2 - longest:]


# -- what methods use ----------------------------------------------------------------------------------------------

def scorer(cfg, text, ref, model=None):
    """The reward that --reward chooses: rows -> scores (B,). ref: the SFT model; model: the reward model, if it is
    loaded already."""
    if cfg.reward == "model":
        return reward.scorer(model or reward.load(cfg, ref), cfg)
    records = records_of(cfg, text, ref)
    if cfg.ready_made:
        return ReadyMade(cfg, text, records)
    if cfg.reward == "judge":
        return AgainstSFT(Annotators(cfg, text, records), ref, text, cfg)
    worth = of_text(cfg)
    return lambda rows: torch.tensor([worth(records[tuple(prompt)], text.decode(response))
                                      for prompt, response in rows])


def spent(score_fn):
    """Metrics: Annotators.spent() of those who give these scores; {} if they are no annotators' scores."""
    return score_fn.annotators.spent() if isinstance(score_fn, AgainstSFT) else {}


def comparer(cfg, text, ref, score_fn=None):
    """(compare, costs) for pairs of answers. compare: rows, rows -> preferences from 1 to 2; costs: () -> metrics.

    If --reward is judge and there is no score_fn, the annotators compare. Else the higher score wins: that of score_fn,
    or of scorer().
    """
    if cfg.reward == "judge" and score_fn is None:
        annotators = Annotators(cfg, text, records_of(cfg, text, ref))
        return annotators, annotators.spent
    score_fn = score_fn or scorer(cfg, text, ref)

    def compare(ones, twos):
        scores = score_fn(ones + twos).view(2, -1)                                       # (2, P)
        return [1.5 if one == two else 1 + (two > one) for one, two in scores.T.tolist()]
    return compare, dict
