"""A judge for trying things on: python tests/plain_judge.py 8123. Give --judge plain --pool p_pairwise.

It prefers an answer that takes up the words of the instruction, ends, repeats nothing, and has about 30 words. No model
is asked, so the same question always gets the same verdict.
"""
import json
import math
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHOWN = re.compile(r"<<<(\w+) instruction\n(.*?)\n\1>>>.*<<<\1 output \(a\)\n(.*?)\n\1>>>.*"
                   r"<<<\1 output \(b\)\n(.*?)\n\1>>>", re.DOTALL)                       # of data/judges/pairwise.json


def quality(instruction, answer):
    """How good an answer is: a number, the higher the better."""
    asked, words = ({*re.findall(r"[a-z]{4,}", instruction.lower())}, re.findall(r"\w+", answer.lower()))
    runs = list(zip(words, words[1:], words[2:]))
    on_topic = len(asked & set(words)) / max(1, len(asked))
    ends = answer.rstrip().endswith((".", "!", "?", "```", ")"))
    repeated = 1 - len(set(runs)) / max(1, len(runs))
    return on_topic + ends - 3 * repeated - abs(math.log((len(words) + 1) / 30)) / 2


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16                                  # one packet a reply

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _, instruction, a, b = SHOWN.search(body["messages"][-1]["content"]).groups()
        best = "a" if quality(instruction, a) >= quality(instruction, b) else "b"
        choice = {"index": 0, "message": {"role": "assistant", "content": f"Output ({best})"}, "finish_reason": "stop"}
        data = json.dumps({"model": body["model"], "choices": [choice],
                           "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
