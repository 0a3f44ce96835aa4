"""The judge for trying things on: the order of answers that it claims, over HTTP as annotate.py asks it."""
import threading
from http.server import ThreadingHTTPServer

import pytest
from plain_judge import Handler, quality

import annotate

ASKED = "Name three large lakes of Africa."
BEST = ("Three of the large lakes of Africa are Lake Victoria, Lake Tanganyika and Lake Malawi. The first of them is "
        "the largest, the second the deepest, and the third has the most kinds of fish.")
WORSE = {"no end": BEST[:-1] + " and",
         "off the topic": "One day a bee met a cow, and the two of them walked home to see what was for dinner.",
         "again and again": "Lake Victoria is a large lake. " * 6, "short": "Victoria.", "long": BEST + " More." * 200}


@pytest.fixture
def plain(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield
    server.shutdown()
    server.server_close()


def test_it_prefers_the_better_answer_wherever_it_is_shown(plain, tmp_path):
    pairs = [{"instruction": ASKED, "input": "", "output_1": one, "output_2": two}
             for worse in WORSE.values() for one, two in ((BEST, worse), (worse, BEST))]
    with annotate.connect("plain", tmp_path / "judge.jsonl") as judge:
        labelled = annotate.annotate(pairs, annotate.pool("plain", "p_pairwise"), judge)
    assert [pair["preference"] for pair in labelled] == [1, 2] * len(WORSE)


@pytest.mark.parametrize("why", WORSE)
def test_each_fault_costs_something(why):
    assert quality(ASKED, WORSE[why]) < quality(ASKED, BEST) - .2
