"""The annotators of the offline world: an OpenAI-compatible server on a loopback port that compares two answers.

An annotator scores both answers by the features of data/barn/reward.py, with weights and noise of its own. There are
two pools. The annotators of `barn-sim` are like simulated ones: they are similar, have little noise, and prefer long
and courteous answers. Those of `barn-human` are like people: two of them agree on about two of three pairs, and on
average they dislike length and stock phrases. A policy can therefore win under one pool and lose under the other.
"""
import hashlib
import json
import math
import random
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data.barn.reward import WEIGHTS, features, known_bigrams, true_reward
from data.barn.world import parse


@dataclass(frozen=True)
class Taste:
    """How one annotator decides."""
    weights: dict           # {feature: its weight}, as WEIGHTS in data/barn/reward.py
    noise: float            # scale of the logistic noise, in units of reward
    first: float            # position bias: the reward that is added for being shown first


# {pool: (annotators, sd of the log of their weights, (mean, sd) of the weight of courtesy as a multiple of the true
# one, (mean, sd) of the weight of 20 words, noise)}
POOLS = {"sim": (13, .35, (1.5, .5), (1.2, .6), .5),
         "human": (16, .7, (-.5, 1.), (-.3, .8), 2.)}


def make_pool(kind):
    """{name: Taste} of the annotators of a pool, the same in every run; their names are like barn-sim-03."""
    size, spread, courtesy, words, noise = POOLS[kind]
    r = random.Random(f"barn tastes {kind}")
    pool = {}
    for i in range(size):
        weights = {name: weight * math.exp(r.gauss(0, spread)) for name, weight in WEIGHTS.items()}
        weights["courteous"] = WEIGHTS["courteous"] * r.gauss(*courtesy)
        weights["words"] = r.gauss(*words)
        pool[f"barn-{kind}-{i:02}"] = Taste(weights, noise, r.gauss(.25, .2))
    return pool


TASTES = {**make_pool("sim"), **make_pool("human")}


def prefers_first(name, instruction, a, b):
    """Whether the annotator `name` prefers the answer a, which is shown first, to b.

    The noise is made from a hash of all arguments: the same question gets the same verdict, so verdicts can be cached.
    """
    taste = TASTES[name]
    margin = true_reward(instruction, a, taste.weights) - true_reward(instruction, b, taste.weights) + taste.first
    digest = hashlib.blake2b("\0".join((name, instruction, a, b)).encode(), digest_size=7).digest()
    u = (int.from_bytes(digest, "big") + .5) / 2 ** 56
    return margin + taste.noise * math.log(u / (1 - u)) > 0


def knows(instruction):
    """Whether an instruction is of this world: of its forms, and about things that there are in it."""
    try:
        return bool(parse(instruction) and features(instruction, ""))
    except (LookupError, ZeroDivisionError):            # such a thing has no properties, such a list no members
        return False


SHOWN = re.compile(r"<<<(\w+) instruction\n(.*?)\n\1>>>.*"              # the prompt of data/judges/pairwise.json
                   r"<<<\1 output \(a\)\n(.*?)\n\1>>>.*<<<\1 output \(b\)\n(.*?)\n\1>>>", re.DOTALL)


class Handler(BaseHTTPRequestHandler):
    """Answers chat completion requests: the model is an annotator's name, the prompt that of pairwise.json."""
    protocol_version = "HTTP/1.1"                       # keep the connection for more requests
    disable_nagle_algorithm = True                      # send small replies at once, not after 40 ms
    wbufsize = 1 << 16

    def do_POST(self):
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model, shown = body["model"], SHOWN.search(body["messages"][-1]["content"])
            known = model in TASTES
        except (ValueError, LookupError, TypeError) as error:
            return self.reply(400, {"error": {"message": f"not a chat completion request: {error}"}})
        if not known:
            return self.reply(404, {"error": {"message": f"no annotator {model!r} here"}})
        if not shown:
            return self.reply(400, {"error": {"message": "this judge reads the prompt of pairwise.json only"}})
        _, instruction, a, b = shown.groups()
        if parse(instruction) and not knows(instruction):
            return self.reply(400, {"error": {"message": f"there is no such thing in this world: {instruction!r:.60}"}})
        verdict = "Output (a)" if prefers_first(model, instruction, a, b) else "Output (b)"
        self.say(model, verdict)

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
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def serve():
    """Serve the annotators on a free loopback port for the length of a with block; yields the base URL."""
    known_bigrams()                                     # fills its cache, or each thread would compute it
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
