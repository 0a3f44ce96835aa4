"""A judge that does what a test tells it, pairs for it, and what it should say of them."""
import json
import random
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from annotate import annotate
from data.judges.prompts import Annotator

JUDGE = Annotator("judge-model", "judge-model")         # one pair at a time, in the form of pairwise.json
SHOWN = re.compile(r"<<<(\w+) instruction\n(.*)\n\1>>>\n\n<<<\1 output \(a\)\n(.*)\n\1>>>\n\n"
                   r"<<<\1 output \(b\)\n(.*)\n\1>>>", re.DOTALL)


def shown(body):
    """(instruction, text shown as (a), text shown as (b)) of a request."""
    return SHOWN.search("\n".join(message["content"] for message in body["messages"])).groups()[1:]


def longer(body, nth):
    _, a, b = shown(body)
    return "Output (a)" if len(a) > len(b) else "Output (b)"


def always_first(body, nth):
    return "Output (a)"


def completion(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}],
                       "usage": {"total_tokens": 7}}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append(dict(self.headers))
            nth = sum(body == other for other in self.server.requests)
        self.reply(self.server.rule(body, nth))

    def reply(self, answer):
        """A verdict; (status, object, headers); the body as bytes; or a function of this handler."""
        if callable(answer):
            self.close_connection = True
            return answer(self)
        status, data, headers = answer if isinstance(answer, tuple) else (200, answer, {})
        data = completion(data) if isinstance(data, str) else data
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass                                            # a client that hangs up is part of these tests


def make_pairs(n, seed=0):
    """Pairs whose answers differ in length, so that the longer one is the same in either order."""
    r = random.Random(seed)
    pairs = []
    for i in range(n):
        one, two = r.sample(range(1, 40), 2)
        pairs.append({"instruction": f"Tell me about cow {i}.", "output_1": "x" * one, "output_2": "x" * two,
                      "generator_1": "one", "generator_2": "two"})
    return pairs


def ask(pairs, judge, **options):
    return annotate(pairs, [JUDGE], judge, **options)


def preferences(records):
    return [record["preference"] for record in records]


def mirrored(pairs):
    return [{**pair, "output_1": pair["output_2"], "output_2": pair["output_1"]} for pair in pairs]


def prefer_longer(pair):
    return 2 if len(pair["output_2"]) > len(pair["output_1"]) else 1
