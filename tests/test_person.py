"""A person as the judge: the page's server, what its clicks become, and the page in a browser."""
import builtins
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from urllib.parse import urlsplit

import pytest
from browser import CHROMIUM, browser
from commands import ROOT, command, refused, started
from judged import make_pairs, prefer_longer, preferences

from annotate import annotate, connect, pool
from data.alpaca_eval import draw
from data.judges import JudgeError
from data.judges import person as person_module

LIMIT = 60                              # seconds after which a thread or a process is taken for hung
ME = pool("me")


class Visitor:
    """What a browser does, without one."""

    def __init__(self, url):
        self.url = urlsplit(url)
        self.state = self.send("GET")

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(self.url.netloc, timeout=LIMIT)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            return reply.status, reply.read(), dict(reply.headers)

    def send(self, method, click=None, **headers):
        status, data, _ = self.request(method, self.url.path + "pair", click and json.dumps(click), **headers)
        assert status == 200, data
        return json.loads(data)

    def click(self, action):
        self.state = self.send("POST", {"id": self.state["id"], "action": action})

    def finish(self, choose):
        """Answer all that is left by choose(instruction, first, second) -> a key, and hand it in."""
        while self.state["id"]:
            self.click(choose(*self.state["texts"]))
        self.click("done")


def by_length(instruction, first, second):
    return "a" if len(first) > len(second) else "b"


class Work(threading.Thread):
    """A function that shows pages, in a thread: its result, and the address that it prints."""

    def __init__(self, capsys, function, *args, **options):
        super().__init__(daemon=True)
        self.capsys, self.call, self.result = capsys, (function, args, options), None
        self.start()

    def run(self):
        function, args, options = self.call
        try:
            self.result = function(*args, **options)
        except Exception as error:
            self.result = error

    def visitor(self):
        printed, ticks = "", threading.Event()
        for _ in range(100 * LIMIT):
            printed += self.capsys.readouterr().out
            if found := re.search(r"http://\S+/(?=\n)", printed):
                return Visitor(found[0])
            assert self.is_alive(), self.result
            ticks.wait(.01)
        raise AssertionError(printed)

    def end(self):
        self.join(LIMIT)
        assert not self.is_alive()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def person(tmp_path):
    with connect("me", tmp_path / "judge.jsonl") as judge:
        yield judge


def label(pairs, judge, capsys, choose=by_length, **options):
    """annotate(), answered by a visitor."""
    work = Work(capsys, annotate, pairs, ME, judge, **options)
    work.visitor().finish(choose)
    return work.end()


# ---- labels --------------------------------------------------------------------------------------------

def test_two_hundred_pairs_in_drawn_orders_and_no_label_is_wrong(person, capsys, tmp_path):
    pairs = make_pairs(200)
    records = label(pairs, person, capsys)
    assert preferences(records) == [prefer_longer(pair) for pair in pairs]
    assert Counter(record["is_switched"] for record in records).keys() == {False, True}
    for record, pair in zip(records, pairs):
        assert pair.items() <= record.items() and (record["annotator"], record["scored_by"]) == ("me", "person")
        won_as_shown = 3 - record["preference"] if record["is_switched"] else record["preference"]
        assert record["raw_completion"] == ["Output (a)", "Output (b)"][won_as_shown - 1]
    assert "200 asked (0 from the cache), 200 usable" in capsys.readouterr().out
    assert len((tmp_path / "me.jsonl").read_text().splitlines()) == 200
    assert annotate(pairs, ME, person) == records               # all known: no page is shown


def test_always_a_is_half_of_either_and_ties_are_one_and_a_half(person, capsys):
    pairs = make_pairs(100)
    records = label(pairs, person, capsys, lambda *texts: "a")
    assert preferences(records) == [2 if record["is_switched"] else 1 for record in records]
    ties = label(pairs[:9], person, capsys, lambda *texts: "=", seed=1)
    assert preferences(ties) == [1.5] * 9 and {record["raw_completion"] for record in ties} == {"tie"}
    assert {record["scored_by"] for record in ties} == {"person"}


def test_a_person_s_labels_are_never_flipped_and_equal_texts_are_not_asked_about(person, capsys):
    pairs = make_pairs(40)
    pairs[7]["output_2"] = pairs[7]["output_1"]
    records = label(pairs, person, capsys, flip=.25)
    assert [record["scored_by"] for record in records].count("person") == 39
    assert preferences(records) == [1.5 if n == 7 else prefer_longer(pair) for n, pair in enumerate(pairs)]


def test_what_comes_twice_is_asked_twice(person, capsys):
    """In one file, or by another seed: how else would one know how far people agree with themselves?"""
    pairs, clicks = make_pairs(10), []

    def alternate(*texts):
        clicks.append(texts)
        return "ab"[len(clicks) % 2]

    assert len(label(pairs + pairs, person, capsys, alternate)) == 20 == len(clicks)
    label(pairs, person, capsys, alternate, seed=1)
    assert len(clicks) == 30
    assert len(annotate(pairs[:1] + pairs, ME, person)) == 11 and len(clicks) == 30     # known, so no page is shown


def test_in_both_orders_the_second_comes_after_all_first_ones(person, capsys):
    pairs, shown = make_pairs(12), []

    def choose(instruction, first, second):
        shown.append((instruction, first, second))
        return "a" if len(shown) <= 12 else by_length(instruction, first, second)

    records = label(pairs, person, capsys, choose, both_orders=True)
    assert len(shown) == 24
    assert [texts[0] for texts in shown[:12]] == [pair["instruction"] for pair in pairs]
    assert [(one, two) for _, two, one in shown[12:]] == [texts[1:] for texts in shown[:12]]
    assert {texts[1] == pair["output_1"] for texts, pair in zip(shown, pairs)} == {True, False}      # blind
    assert [len(record["preference_by_order"]) for record in records] == [2] * 12


def test_another_person_s_answers_are_not_yours(person, capsys, tmp_path):
    pairs = make_pairs(5)
    label(pairs, person, capsys)
    with connect("me:anna", tmp_path / "judge.jsonl") as anna:
        work = Work(capsys, annotate, pairs, pool("me:anna"), anna)
        work.visitor().finish(lambda *texts: "=")
        records = work.end()
    assert preferences(records) == [1.5] * 5 and {record["annotator"] for record in records} == {"me:anna"}
    assert preferences(annotate(pairs, ME, person)) == [prefer_longer(pair) for pair in pairs]


# ---- the page's server ---------------------------------------------------------------------------------

@pytest.fixture
def work(person, capsys):
    """Ten pairs that wait for a person; what a test leaves open is handed in."""
    work = Work(capsys, annotate, make_pairs(10), ME, person)
    work.page = work.visitor()
    yield work
    if work.is_alive():
        work.page.state = work.page.send("GET")
        work.page.finish(by_length)
    work.end()


def test_the_browser_is_told_nothing_but_the_texts_that_are_compared(work):
    state = work.page.state
    assert state.keys() == {"total", "answered", "id", "texts"} and len(state["texts"]) == 3
    assert re.fullmatch("[0-9a-f]{64}", state["id"]) and (state["total"], state["answered"]) == (10, 0)
    assert "one" not in json.dumps(state) and "two" not in json.dumps(state)         # the generators


def test_the_page_needs_nothing_from_elsewhere(work):
    status, page, headers = work.page.request("GET", work.page.url.path)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.findall(rb"""(?:src|href)=["'](?!data:,)|url\(|https?://|@import|innerHTML""", page)
    policy = headers["Content-Security-Policy"]
    (nonce,) = set(re.findall("'nonce-([^']+)'", policy))
    assert policy.startswith("default-src 'none'") and page.count(f'nonce="{nonce}"'.encode()) == 2
    assert b"NONCE" not in page and headers["Referrer-Policy"] == "no-referrer"
    assert "Set-Cookie" not in headers and headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example:80"}, {"Host": ""}, {"Host": "10.0.0.1"},
    {"Host": "localhost:80@evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://localhost"},
    {"Host": "evil.example", "Origin": "http://evil.example"}], ids=str)
def test_other_sites_are_refused(work, person, headers):
    click = json.dumps({"id": work.page.state["id"], "action": "a"})
    for method, path in (("POST", "pair"), ("GET", "pair"), ("GET", "")):
        status, body, _ = work.page.request(method, work.page.url.path + path, click, **headers)
        assert status == 403 and work.page.state["texts"][0].encode() not in body
    assert not person.calls


def test_the_page_may_come_through_a_tunnel_from_another_port(work):
    for host in ("localhost:9999", "127.0.0.1", f"localhost:{work.page.url.port}"):
        assert work.page.send("GET", Host=host, Origin=f"http://{host}")["total"] == 10


@pytest.mark.parametrize("method, path, body, status", [
    ("GET", "/", None, 404), ("GET", "pair", None, 404), ("POST", "pair", b'{"id": "", "action": "a"}', 404),
    ("GET", "/pair", None, 404), ("POST", "/pair", b"{}", 404), ("GET", "/x/pair", None, 404),
    ("POST", "TOKEN/", b"{}", 404), ("GET", "TOKEN/../me.jsonl", None, 404), ("PUT", "TOKEN/pair", b"{}", 501),
    ("POST", "TOKEN/pair", b"", 400), ("POST", "TOKEN/pair", b"[]", 400), ("POST", "TOKEN/pair", b"\xff", 400),
    ("POST", "TOKEN/pair", b'{"id": "x"}', 400), ("POST", "TOKEN/pair", b"[" * 999, 400),
    ("POST", "TOKEN/pair", json.dumps({"id": "x" * 5000, "action": "a"}).encode(), 413)])
def test_what_is_no_click_is_refused(work, person, method, path, body, status):
    path = path.replace("TOKEN/", work.page.url.path)
    assert work.page.request(method, path, body)[0] == status and not person.calls
    assert work.page.send("GET") == work.page.state                 # and the next one gets through


@pytest.mark.parametrize("action", ["c", "", "A", None, 1, "done", "undo", "tie"])
def test_what_is_no_answer_changes_nothing(work, person, action):
    before = work.page.state
    work.page.click(action)
    assert work.page.state == before and not person.calls


def test_a_second_tab_answers_no_pair_that_it_does_not_show(work, person):
    first, second = work.page, Visitor(work.page.url.geturl())
    shown = second.state["id"]
    first.click("a")
    second.click("b")                                               # at a pair that has its answer
    assert second.state.pop("stale") and second.state == first.state and person.calls == 1
    first.state = {**first.state, "id": shown}                      # a press that came twice
    first.click("b")
    assert first.state.pop("stale") and first.state == second.state and person.calls == 1
    second.click("b")
    assert second.state["answered"] == person.calls == 2


def test_undo_goes_back_in_the_order_of_the_clicks_and_is_written_too(work, person, tmp_path):
    page, seen = work.page, []
    for action in "ab=":
        seen.append(page.state["id"])
        page.click(action)
    fourth = page.state["id"]
    for key in reversed(seen):
        page.click("undo")
        assert page.state["id"] == key
    page.click("undo")                                              # nothing is left to undo
    assert (page.state["id"], page.state["answered"]) == (seen[0], 0)
    for action in "bba":
        page.click(action)
    assert page.state["id"] == fourth
    lines = [json.loads(line) for line in (tmp_path / "me.jsonl").read_text().splitlines()]
    said = [(seen.index(line["key"]), line["choice"]["message"]["content"]) for line in lines]
    assert said == [(0, "Output (a)"), (1, "Output (b)"), (2, "tie"), (2, "undo"), (1, "undo"), (0, "undo"),
                    (0, "Output (b)"), (1, "Output (b)"), (2, "Output (a)")]
    page.finish(by_length)
    assert [record["raw_completion"] for record in work.end()[:3]] == ["Output (b)", "Output (b)", "Output (a)"]


def test_the_last_answer_can_be_taken_back_until_all_are_handed_in(work):
    page = work.page
    while page.state["id"]:
        last = page.state["id"]
        page.click("a")
    assert page.state["answered"] == 10 and work.is_alive()
    page.click("undo")
    assert page.state["id"] == last
    page.click("done")                                              # not yet
    assert page.state["id"] == last
    page.click("b")
    page.click("done")
    assert page.state == {"total": 0, "answered": 0, "id": "", "texts": []}
    assert work.end()[-1]["raw_completion"] == "Output (b)"
    page.click("undo")                                              # too late
    assert page.state["total"] == 0


def test_the_page_goes_on_with_the_next_pairs_of_a_command(person, capsys):
    def rounds():
        return [annotate(make_pairs(3), ME, person, seed) for seed in (0, 1)]

    work = Work(capsys, rounds)
    page = work.visitor()
    page.finish(by_length)
    wait = threading.Event()
    while not page.state["total"]:                                  # as the page does
        wait.wait(.02)
        page.state = page.send("GET")
    page.finish(by_length)
    assert list(map(preferences, work.end())) == [[prefer_longer(pair) for pair in make_pairs(3)]] * 2


def test_a_click_that_cannot_be_written_is_an_error_on_the_page_and_of_the_command(person, capsys, monkeypatch):
    def full(*args, **answer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(person.cache, "put", full)
    work = Work(capsys, annotate, make_pairs(3), ME, person)
    page = work.visitor()
    click = json.dumps({"id": page.state["id"], "action": "a"})
    status, body, _ = page.request("POST", page.url.path + "pair", click)
    assert status == 500 and b"could not be saved: No space left" in body
    with pytest.raises(OSError, match="No space left"):
        work.end()


# ---- the commands --------------------------------------------------------------------------------------

def start(script, *argv):
    return started([sys.executable, str(ROOT / script), *map(str, argv)], stdout=subprocess.PIPE,
                   stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def address(process):
    return next(line.strip() for line in process.stdout if "http://" in line)


def test_a_killed_command_goes_on_where_it_was_and_ctrl_c_says_so(tmp_path):
    pairs, out, clicks = make_pairs(20), tmp_path / "out.json", 0
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    for stop, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (None, 0)):
        process = start("annotate.py", tmp_path / "pairs.json", "--judge", "me", "--out", out)
        page = Visitor(address(process))
        assert page.state["answered"] == clicks
        if not stop:
            page.finish(by_length)
            _, errors = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, errors
            break
        for _ in range(7):
            page.click(by_length(*page.state["texts"]))
        clicks += 7
        process.send_signal(stop)                                   # right after the reply: the click is on disk
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == code and not out.exists()
        assert stop is signal.SIGKILL or "interrupted; every answer is kept" in errors
        with (tmp_path / "me.jsonl").open("ab") as file:
            file.write(b'{"key": "torn')                            # as a kill leaves it
    assert preferences(json.loads(out.read_text())) == [prefer_longer(pair) for pair in pairs]


def test_annotating_from_the_command_line(tmp_path, capsys):
    path, out = tmp_path / "pairs.json", tmp_path / "labels" / "me.json"
    path.write_text(json.dumps(make_pairs(6)))
    argv = "annotate.py", path, "--judge", "me", "--out", out
    dry = command(*argv, "--dry_run", "--seeds", 2)
    assert (dry.code, dry.out) == (0, "12 labels, 0 of them coins; 12 pairs for me, 0 answered before\n")
    refused(command(*argv, "--flip", ".25"), 2, "--flip would change nothing: a person's labels are not flipped")
    refused(command(*argv, "--replay"), 3, "6 of 6 verdicts are unusable, for example 'not in the cache'")


def test_judging_outputs_and_labels_from_eval(tmp_path):
    pairs, answers = make_pairs(8), {}
    for name, key in (("ours", "output_2"), ("theirs", "output_1")):
        answers[name] = tmp_path / f"{name}.json"
        answers[name].write_text(json.dumps([{"instruction": pair["instruction"], "output": pair[key],
                                              "generator": name} for pair in pairs]))
    process = start("eval.py", "--outputs", answers["ours"], "--reference", answers["theirs"], "--judge", "me",
                    "--out", tmp_path)
    Visitor(address(process)).finish(by_length)
    out, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    labels = tmp_path / "ours" / "annotations.json"
    assert preferences(json.loads(labels.read_text())) == [prefer_longer(pair) for pair in pairs]
    assert "win rate over theirs" in out

    # Once more each, by the place alone: the first labels are known, and the second contradict some of them.
    process = start("eval.py", "--judge_report", labels, "--judge", "me", "--human", labels, "--seeds", 2, "--out",
                    tmp_path)
    Visitor(address(process)).finish(lambda *texts: "a")
    out, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    turned = [draw("is_switched_outputs", pair["instruction"] + "1", [False, True]) for pair in pairs]
    same = [prefer_longer(pair) == 1 + switched for pair, switched in zip(pairs, turned)]
    assert 0 < sum(same) < 8
    assert re.search(rf"^Variance +{100 * (1 - sum(same) / 8):.2f}$", out, re.MULTILINE)


@pytest.mark.slow
def test_a_farm_run_asks_for_labels_and_for_win_rates_and_flips_nothing(tmp_path):
    process = start("farm.py", "--method", "dpo", "--judge", "me", "--limit", 6, "--max_new_tokens", 6,
                    "--out", tmp_path)
    Visitor(address(process)).finish(lambda *texts: "a")                # labels of pairs
    page = Visitor(address(process))                                    # answers of two stages against the reference
    page.finish(lambda *texts: "=")
    while not page.state["total"]:
        page.state = page.send("GET")
    page.finish(lambda *texts: "=")
    out, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    pairs = json.loads((tmp_path / "pairs" / "pairs.json").read_text())
    assert pairs and {pair["scored_by"] for pair in pairs} == {"person"}
    assert all(pair["preference"] == 1 + pair["is_switched"] for pair in pairs)
    assert re.search(r"^dpo +50\.0 ", out, re.MULTILINE) and not (tmp_path / "base").exists()


# ---- keys that are typed in a notebook -----------------------------------------------------------------

class Keyboard:
    """A person in a notebook: types these keys first, and then what by_length says of the pair that is shown."""

    def __init__(self, person, *first):
        self.person, self.first, self.prompts = person, list(first), []

    def __call__(self, asks):
        self.prompts.append(asks)
        texts = self.person.state()["texts"]
        return self.first.pop(0) if self.first else by_length(*texts) if texts else ""


@pytest.fixture
def in_a_notebook(monkeypatch):
    """typing(keyboard) -> what input() asks is answered by it, as below a cell (test_notebook.py has a real one)."""
    monkeypatch.setattr(person_module, "in_a_notebook", lambda: True)
    return lambda keyboard: monkeypatch.setattr(builtins, "input", keyboard)


def test_in_a_notebook_the_pairs_are_printed_and_keys_are_typed(person, capsys, in_a_notebook):
    pairs, keyboard = make_pairs(6), Keyboard(person, "u", "x", "", " A ", "u", "done")
    in_a_notebook(keyboard)
    assert preferences(annotate(pairs, ME, person)) == [prefer_longer(pair) for pair in pairs]
    shown = capsys.readouterr().out
    assert all(pair[key] in shown for pair in pairs for key in ("instruction", "output_1", "output_2"))
    assert "http" not in shown and max(map(len, shown.splitlines())) <= 80
    taken = [int(asks.split()[0]) for asks in keyboard.prompts if asks[0].isdigit()]
    assert taken == [1, 1, 1, 1, 2, 1, 1, 2, 3, 4, 5, 6] and len(keyboard.prompts) == 13


def test_the_last_typed_answer_can_be_taken_back_too(person, in_a_notebook):
    pairs = make_pairs(2)
    in_a_notebook(Keyboard(person, "=", "=", "u"))
    assert preferences(annotate(pairs, ME, person)) == [1.5, prefer_longer(pairs[1])]


@pytest.mark.parametrize("error", [EOFError, NotImplementedError])
def test_where_nobody_can_type_what_was_typed_is_kept(person, in_a_notebook, error):
    pairs = make_pairs(3)

    def gone(asks):
        if asks.startswith("2 of 3"):
            raise error
        return "="

    in_a_notebook(gone)
    with pytest.raises(JudgeError, match="nobody can type an answer here"):
        annotate(pairs, ME, person)
    in_a_notebook(Keyboard(person))
    assert preferences(annotate(pairs, ME, person))[0] == 1.5


def test_an_empty_answer_is_seen_as_one_and_lines_are_kept():
    assert person_module.shown("Answer a", "") == "Answer a:\n  (empty)"
    assert person_module.shown("Answer a", f"one\n\n{'word ' * 20}").splitlines()[1:3] == ["  one", ""]


# ---- the page in a browser -----------------------------------------------------------------------------

@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_in_a_browser(person, capsys, tmp_path):
    hostile = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>\n\n  two"
    pairs = [{"instruction": "Say it & more.", "input": "<b>now</b>", "output_1": hostile, "output_2": "short"},
             {"instruction": "Say nothing.", "output_1": "", "output_2": "A word " + 400 * "wide"}, *make_pairs(3)]
    work = Work(capsys, annotate, pairs, ME, person)
    url = work.visitor().url.geturl()
    with browser(tmp_path / "profile") as page:
        page.look(1280)
        page.call("Page.navigate", url=url)
        page.wait("typeof state !== 'undefined' && state")
        seen = drive(page, pairs)
    assert seen == {pair["instruction"] for pair in pairs[1:]} | {"Say it & more.\n\n<b>now</b>"}
    assert preferences(work.end()) == [prefer_longer(pair) for pair in pairs]


def drive(page, pairs):
    """Answer all pairs by keys and by clicks, with a slip that is taken back -> the instructions that were shown."""
    seen = set()
    for n in range(len(pairs)):
        page.wait(f"part('count').textContent.startsWith('{n} of {len(pairs)} ') && !busy")
        instruction, first, second = (page.js(f"part('{name}').textContent")
                                      for name in ("instruction", "first", "second"))
        assert page.js("document.title") == "Which answer is better?"
        seen.add(instruction)
        for width in (390, 1280):
            page.look(width, dark=n % 2)
            assert page.js("document.documentElement.scrollWidth <= innerWidth")
            assert page.js("[...document.querySelectorAll('#choose button')].every(button => { const box = "
                           "button.getBoundingClientRect(); return box.height >= 36 && box.bottom <= innerHeight; })")
        page.js("since = performance.now() + 1e6")
        page.press("a")                                             # too early to have been meant for this pair
        page.js("since = -REST")
        assert not page.js("busy") and page.js("part('count').textContent").startswith(f"{n} of")
        if n == 2:
            slip = "ba"[first > second]
            page.press(slip)
            page.wait("part('count').textContent.startsWith('3 of') && !busy")
            page.press("u")
            page.wait("part('count').textContent.startsWith('2 of') && !busy")
            page.js("since = -REST")
        action = by_length(instruction, first, second)
        page.press(action) if n % 2 else page.js(f"document.querySelector('[data-action={action}]').click()")
    page.wait("!part('handin').hidden && !busy")
    page.press("Enter")
    page.wait("part('title').textContent === 'All done'")
    return seen
