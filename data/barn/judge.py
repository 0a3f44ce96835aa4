"""The annotators of the offline world: tastes and noise behind an OpenAI-compatible endpoint on a loopback port.

Two pools read the same features of an answer. `barn-sim` is the simulator: like-minded annotators with little noise who
pay for length and for courtesy. `barn-human` stands for people: they agree with each other about two times in three,
and on average length and ready-made phrases put them off, so a policy can please the one pool and not the other.
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

from data.barn.reward import WEIGHTS, known_bigrams, true_reward


@dataclass(frozen=True)
class Taste:
    weights: dict           # what this annotator values, by feature
    noise: float            # scale of the logistic noise, in units of reward
    first: float            # position bias: what standing first is worth


#              size, spread of the weights, mean and sd of: courtesy (x the true weight), length (per 20 words); noise
POOLS = {"sim": (13, .35, (1.5, .5), (1.2, .6), .5),
         "human": (16, .7, (-.5, 1.), (-.3, .8), 2.)}


def make_pool(kind):
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
    """Whether annotator `name` prefers a, shown first, to b. The noise is a hash of everything it saw: asked again,
    it says the same, so answers can be cached."""
    taste = TASTES[name]
    margin = true_reward(instruction, a, taste.weights) - true_reward(instruction, b, taste.weights) + taste.first
    digest = hashlib.blake2b("\0".join((name, instruction, a, b)).encode(), digest_size=7).digest()
    u = (int.from_bytes(digest, "big") + .5) / 2 ** 56
    return margin + taste.noise * math.log(u / (1 - u)) > 0


SHOWN = re.compile(r"<<<(\w+) instruction\n(.*?)\n\1>>>.*"              # the form of data/judges/pairwise.json
                   r"<<<\1 output \(a\)\n(.*?)\n\1>>>.*<<<\1 output \(b\)\n(.*?)\n\1>>>", re.DOTALL)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"                       # keep the connection
    disable_nagle_algorithm = True                      # a reply is small: do not wait 40 ms for more of it
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
            return self.reply(400, {"error": {"message": "this judge reads the form of pairwise.json only"}})
        _, instruction, a, b = shown.groups()
        verdict = "Output (a)" if prefers_first(model, instruction, a, b) else "Output (b)"
        message = {"role": "assistant", "content": verdict}
        self.reply(200, {"object": "chat.completion", "model": model,
                         "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                         "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}})

    def reply(self, status, document):
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
    known_bigrams()                                     # built before the threads that would each build it
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
