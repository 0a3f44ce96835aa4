"""The annotators of the offline world: an OpenAI-compatible server on a loopback port that compares two answers.

An annotator scores both answers by the features of data/barn/reward.py, with weights and noise of its own. There are
three pools. The annotators of `barn-sim` are like simulated ones: they are similar, have little noise, and prefer long
and courteous answers. Those of `barn-human` are like people: two of them agree on less than two of three pairs, and on
average they dislike length and stock phrases. A policy can therefore win under one pool and lose under the other.
`barn-far` are the same people with tastes that are twice as far from those of `barn-sim`: a control.

The noise is logistic, so the probability of a verdict is known: win_probabilities() needs no annotator to be asked.
"""
import hashlib
import json
import math
import random
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from data import loopback
from data.barn.reward import WEIGHTS, features, kind_and_slots, known_bigrams, true_reward
from data.barn.world import parse
from data.judges.cache import GARBAGE

BODY = 1 << 20                          # the most bytes that a request may have


@dataclass(frozen=True)
class Taste:
    """How one annotator decides."""
    weights: dict           # {feature: its weight}, as WEIGHTS in data/barn/reward.py
    noise: float            # scale of the logistic noise, in units of reward
    first: float            # position bias: the reward that is added for being shown first


@dataclass(frozen=True)
class Pool:
    """How the tastes of a pool of annotators are drawn."""
    name: str               # its annotators are called like barn-sim-03
    seed: str               # pools with the same seed have the same people, only with other tastes
    size: int               # annotators
    spread: float           # sd of the log of their weights, beside the true ones
    courtesy: tuple         # (mean, sd) of the weight of courtesy, as a multiple of the true one
    words: tuple            # (mean, sd) of the weight of 20 words
    noise: float            # of each annotator, as in Taste


SIM = Pool("sim", "sim", 13, .35, (1.5, .5), (1.2, .6), .5)
# With noise 3 one person agrees with the mode of three others in 65 %, as in AlpacaFarm.
HUMAN = Pool("human", "human", 16, .7, (-.5, 1.), (-.3, .8), 3.)


def pool_at(distance, name="at"):
    """The pool of people whose mean tastes are `distance` times as far from those of SIM as HUMAN's are.

    distance: 0 has SIM's mean tastes, 1 is HUMAN, 2 the pool `far`. The people and their noise are those of HUMAN.
    """
    courtesy, words = (near[0] + distance * (human[0] - near[0])
                       for near, human in ((SIM.courtesy, HUMAN.courtesy), (SIM.words, HUMAN.words)))
    return replace(HUMAN, name=name, courtesy=(courtesy, HUMAN.courtesy[1]), words=(words, HUMAN.words[1]))


POOLS = {"sim": SIM, "human": HUMAN, "far": pool_at(2, "far")}


def make_pool(pool):
    """{name: Taste} of the annotators of a Pool, the same in every run."""
    r = random.Random(f"barn tastes {pool.seed}")
    tastes = {}
    for i in range(pool.size):
        weights = {name: weight * math.exp(r.gauss(0, pool.spread)) for name, weight in WEIGHTS.items()}
        weights["courteous"] = WEIGHTS["courteous"] * r.gauss(*pool.courtesy)
        weights["words"] = r.gauss(*pool.words)
        tastes[f"barn-{pool.name}-{i:02}"] = Taste(weights, pool.noise, r.gauss(.25, .2))
    return tastes


TASTES = {name: taste for pool in POOLS.values() for name, taste in make_pool(pool).items()}


# -- verdicts, and how likely they are --------------------------------------------------------------------------

def margin(taste, instruction, a, b):
    """By how much an annotator prefers the answer a, which is shown first, to b, without noise, in units of reward."""
    return true_reward(instruction, a, taste.weights) - true_reward(instruction, b, taste.weights) + taste.first


def prefers_first(name, instruction, a, b, tastes=TASTES):
    """Whether the annotator `name` prefers the answer a, which is shown first, to b.

    The noise is made from a hash of all texts: the same question gets the same verdict, so verdicts can be cached.
    tastes: {name: Taste}, of the pools above unless it is another one from make_pool().
    """
    digest = hashlib.blake2b("\0".join((name, instruction, a, b)).encode(), digest_size=7).digest()
    u = (int.from_bytes(digest, "big") + .5) / 2 ** 56
    return margin(tastes[name], instruction, a, b) + tastes[name].noise * math.log(u / (1 - u)) > 0


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2


def probability_first(taste, instruction, a, b):
    """The probability that an annotator prefers the answer a, which is shown first, to b."""
    return float(sigmoid(margin(taste, instruction, a, b) / taste.noise))


def win_probabilities(tastes, rows):
    """The probability (N,) that an answer is preferred to another: the mean over all annotators and both orders.

    tastes: {name: Taste}. rows: N times (instruction, the answer, the other answer), as texts.
    """
    gains = [[one[name] - other[name] for name in WEIGHTS] for one, other in (
        (features(instruction, answer), features(instruction, other)) for instruction, answer, other in rows)]
    weights = [[taste.weights[name] for name in WEIGHTS] for taste in tastes.values()]
    first, noise = (np.array([getattr(taste, name) for taste in tastes.values()]) for name in ("first", "noise"))
    margins = np.array(gains).reshape(-1, len(WEIGHTS)) @ np.array(weights).T           # (N, annotators)
    return ((sigmoid((margins + first) / noise) + sigmoid((margins - first) / noise)) / 2).mean(1)


def preferences(tastes, rows, seed=0):
    """Labels [1 or 2] of rows (instruction, answer 1, answer 2): one annotator sees each row, in one order.

    tastes: {name: Taste}. The texts and the seed decide which annotator sees a row, and in which order.
    """
    labels = []
    for instruction, one, two in rows:
        r = random.Random("\0".join((str(seed), instruction, one, two)))
        name = r.choice(list(tastes))
        if r.random() < .5:
            labels.append(1 if prefers_first(name, instruction, one, two, tastes) else 2)
        else:
            labels.append(2 if prefers_first(name, instruction, two, one, tastes) else 1)
    return labels


def knows(instruction):
    """Whether an instruction is of this world: of its forms, and about things that exist in it."""
    return kind_and_slots(instruction)[0] is not None


def texts_shown(prompt):
    """[instruction, output (a), output (b)] of a prompt in the form of data/judges/pairwise.json; ValueError for any
    other.

    Each text stands between two lines with a mark, which the first line names. The search only goes forward, so that
    its time is proportional to the length of the prompt.
    """
    first = re.search(r"<<<(\w+) instruction\n", prompt)
    if not first:
        raise ValueError("no instruction is shown")
    mark, texts, end = first[1], [], first.start()
    for what in ("instruction", "output (a)", "output (b)"):
        opening = f"<<<{mark} {what}\n"
        begin = prompt.index(opening, end) + len(opening)
        end = prompt.index(f"\n{mark}>>>", begin)
        texts.append(prompt[begin:end])
    return texts


class Handler(loopback.Handler):
    """Answers chat completion requests: the model is an annotator's name, the prompt that of pairwise.json."""
    wbufsize = 1 << 16

    def do_POST(self):
        try:
            body = self.body(BODY)
            if self.is_from_elsewhere():
                return self.refuse(403, "this judge is for programs on this machine")
            body = json.loads(body)
            model, prompt = body["model"], body["messages"][-1]["content"]
            prompt.encode(), hash(model)
        except loopback.Unread as error:
            return self.refuse(error.status, str(error))
        except GARBAGE as error:
            return self.refuse(400, f"not a chat completion request: {error}")
        if model not in TASTES:
            return self.refuse(404, f"no annotator {model!r:.60} here")
        try:
            instruction, a, b = texts_shown(prompt)
        except ValueError:
            return self.refuse(400, "this judge reads the prompt of pairwise.json only")
        if parse(instruction) and not knows(instruction):
            return self.refuse(400, f"there is no such thing in this world: {instruction!r:.60}")
        self.say(model, "Output (a)" if prefers_first(model, instruction, a, b) else "Output (b)")

    def refuse(self, status, message):
        self.reply(status, {"error": {"message": message}})

    def say(self, model, verdict):
        """Send a verdict as a chat completion."""
        message = {"role": "assistant", "content": verdict}
        self.reply(200, {"object": "chat.completion", "model": model,
                         "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                         "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}})

    def reply(self, status, document):
        """Send a whole reply with a JSON body."""
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve():
    """Serve the annotators on a free loopback port for the length of a with block; yields the base URL."""
    known_bigrams()                                     # fills its cache, or each thread would compute it
    server = loopback.Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
