"""A judge for trying things on: python -m tests.plain_judge 8123. Give --judge plain --pool p_pairwise.

It prefers an answer that takes up the words of the instruction, ends, repeats nothing, and has about 30 words. No model
is asked, so the same question always gets the same verdict.
"""
import json
import math
import re
import sys
from http.server import ThreadingHTTPServer

from data.barn import judge


def quality(instruction, answer):
    """How good an answer is: a number, the higher the better."""
    asked, words = ({*re.findall(r"[a-z]{4,}", instruction.lower())}, re.findall(r"\w+", answer.lower()))
    runs = list(zip(words, words[1:], words[2:]))
    on_topic = len(asked & set(words)) / max(1, len(asked))
    ends = answer.rstrip().endswith((".", "!", "?", "```", ")"))
    repeated = 1 - len(set(runs)) / max(1, len(runs))
    return on_topic + ends - 3 * repeated - abs(math.log((len(words) + 1) / 30)) / 2


class Handler(judge.Handler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        instruction, a, b = judge.texts_shown(body["messages"][-1]["content"])
        best = "a" if quality(instruction, a) >= quality(instruction, b) else "b"
        self.say(body["model"], f"Output ({best})")


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
