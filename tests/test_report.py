"""report.html: what it shows of a run, what it leaves out, hostile texts, and the page in a browser."""
import json
import re
import shutil
from html.parser import HTMLParser
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, browser
from commands import command

from data.judges.prices import spent
from data.run_folders import contents
from stats import plots, report, run_report, run_traces
from stats.run_report import POINTS, Run

HOSTILE = ("</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
           " \ud83d 😀 \u202e")


class Parsed(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "img", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def cells(html):
    """[[cell, ...], ...] of a table, its head first."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


# ---- the page ------------------------------------------------------------------------------------------

def test_a_page_has_its_sections_and_asks_for_nothing():
    svg = plots.lines({"a": ([1, 2], [3, 4])}, "Title", "x", "y")
    page = report.page("Name", {"One": [report.prose("First.\n\nSecond."), report.figure(svg, "Seen.", ["x"], [[1]])],
                                "Nothing": [], "Two & 3": [report.code("python x.py")]}, "Lead.")
    parsed = Parsed(page)
    assert parsed.count("section") == 2 and parsed.count("svg") == 1 and parsed.count("figcaption") == 1
    assert [attrs["id"] for tag, attrs in parsed.tags if tag == "section"] == ["one", "two-3"]
    assert "First." in parsed.text and "Two & 3" in parsed.text and "Nothing" not in parsed.text
    for _, attrs in parsed.tags:
        for key in ("src", "href", "action", "data", "poster"):
            assert attrs.get(key, "#").startswith(("#", "data:")), attrs
    assert not re.search(r"url\(|@import", page)


def test_texts_are_escaped_everywhere():
    parts = [report.prose(HOSTILE), report.heading(HOSTILE), report.code(HOSTILE), report.table([HOSTILE], [[HOSTILE]]),
             report.details(HOSTILE), report.figure("", HOSTILE, [HOSTILE], [[HOSTILE]]),
             report.tokens([HOSTILE], ["learned"]),
             report.browser([HOSTILE], [{"asked": HOSTILE, "kind": HOSTILE, "answers": []}])]
    page = report.page(HOSTILE, {HOSTILE: parts}, HOSTILE)
    page.encode()
    parsed = Parsed(page)
    assert parsed.count("script") == 2 and parsed.count("img") == 0        # the answers and the frame's own


def test_what_the_script_reads_is_what_was_given():
    cases = [{"asked": HOSTILE, "kind": "", "answers": [{"by": "m", "text": HOSTILE, "won": 1, "worth": nan}]}]
    html = report.browser(["m"], cases)
    data = json.loads(re.search(r'id="answers-data">(.*?)</script>', html)[1])
    assert data["cases"][0]["asked"] == HOSTILE and data["cases"][0]["answers"][0]["text"] == HOSTILE
    assert data["cases"][0]["answers"][0]["worth"] is None


def test_a_table_writes_numbers_as_people_do():
    html = report.table(["name", "n", "empty", "x"], [["a", 12345, None, .123456], ["b", -3, nan, nan]])
    assert cells(html) == [["name", "n", "x"], ["a", "12,345", "0.1235"], ["b", "−3", ""]]
    assert html.count('"number"') == 6 and [report.cell(x) for x in (True, 123456.7, "t")] == ["True", "123457", "t"]


# ---- a run folder, written by hand ---------------------------------------------------------------------

def annotation(i, name, preference, **more):
    return {"instruction": f"Say {i}.", "input": "", "dataset": "even" if i % 2 == 0 else "odd", "output_1": f"one {i}",
            "output_2": f"{name} {i} " + "more " * 8, "generator_1": "reference", "generator_2": name,
            "annotator": f"judge-{i % 2}", "preference": preference, "is_switched": i % 3 == 0, "judge": "many", **more}


def lines_of(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def made(tmp_path):
    return made_in(tmp_path / "run")


def made_in(run):
    """A run with SFT, pairs, DPO, PPO and best-of-n, as farm.py leaves it. Returns its folder."""
    needs = {"sft": {}, "pairs": {"sft": "sft"}, "dpo": {"sft": "sft", "pairs": "pairs"}, "ppo": {"sft": "sft"},
             "best_of_n": {"sft": "sft"}}
    for name, needed in needs.items():
        folder = run / name
        folder.mkdir(parents=True)
        settings = {"id": name, "needs": needed, "seed": 0, "method": name, "model": "tiny", "lr": 1e-4, "beta": .2,
                    "changed": ["beta"], "versions": {"numpy": "2"}, "commit": "abc", "contents": {"data": "h"}}
        (folder / "config.json").write_text(json.dumps(settings))
        metrics = {"objective/kl": 1.5, "eval/finished": .5, "judge/asked": 7}
        (folder / "result.json").write_text(json.dumps({"seconds": 2.5, "cpu_seconds": 2., "metrics": metrics}))
    for name, rate in (("sft", 4), ("dpo", 2), ("ppo", 3)):
        records = [annotation(i, name, 1 + (i % rate == 0)) for i in range(12)]
        (run / name / "annotations.json").write_text(json.dumps(records))
    lines_of(run / "sft" / "metrics.jsonl", [{"step": i, "loss": 1 / (1 + i), "lr": .1} for i in range(5)])
    lines_of(run / "sft" / "samples.jsonl", [
        {"step": 0, "tokens": ["<q>", " a", " b", "<end>"], "mask": [0, 1, 1], "prompt": 2,
         "length": 4, "ends": True},
        {"step": 0, "instruction": "Say.", "output": "b"}])
    lines_of(run / "ppo" / "metrics.jsonl", [{"step": i, "objective/kl": i / 2, "objective/scores": i ** .5,
                                              "val/ratio": None} for i in range(9)])
    (run / "best_of_n" / "curve.json").write_text(json.dumps(
        {"n": [1, 2, 3, 4], "kl": [0, .2, .4, .6], "score": [0, .5, .7, .8], "random_score": [0] * 4,
         "true_reward": [1, 2, 2, 1.5], "random_true_reward": [1] * 4}))
    pairs = [{"instruction": "Say.", "output_1": "x" * 50, "output_2": "y", "preference": 1 + (i % 4 == 0),
              "annotator": f"judge-{i % 2}", "is_switched": False, "scored_by": "text"} for i in range(8)]
    pairs[0]["raw_completion"] = "Output (a)"
    (run / "pairs" / "pairs.json").write_text(json.dumps(pairs))
    lines_of(run / "ppo" / "samples.jsonl", [
        {"step": 5, "tokens": ["<q>", " a", " b"], "mask": [0, 1], "prompt": 2, "length": 3, "ends": False,
         "scores": [.5], "kl": [0, .25], "value": [0, 1.], "reward": [0, .475], "advantage": [0, -1.]}])
    usage = {"prompt_tokens": 1000, "completion_tokens": 10}
    asked = [{"role": "user", "content": f"Is (a) {'x' * 50} or (b) y better? Say."}]
    lines_of(run / "judge.jsonl", [{"model": "dear", "usage": usage, "before": [usage], "request": {"messages": asked},
                                    "choice": {"message": {"content": "Output (a)"}}},
                                   {"model": "odd", "usage": None}])
    return run


def report_of(run, *more):
    """The page that eval.py makes of a run folder."""
    ended = command("eval.py", run, *more, "--report", "--out", run.parent / "out")
    assert ended.code == 0, ended.err
    assert "report.html shows them" in " ".join(ended.out.split())
    return (run.parent / "out" / "report.html").read_text(encoding="utf-8")


def section(page, heading):
    """The HTML of one section; "" if it is left out."""
    found = re.search(rf"<section id=\"[\w-]+\"><h2>{heading}</h2>(.*?)</section>", page, re.DOTALL)
    return found[1] if found else ""


def test_a_report_shows_what_is_in_a_run_folder(made):
    page = report_of(made)
    parsed = Parsed(page)
    assert [re.sub(r"<.*?>", "", each) for each in re.findall(r"<h2>(.*?)</h2>", page)] == [*run_report.SECTIONS]
    assert "cannot be shown" not in page and parsed.count("svg") == 1 + 1 + 2 + 1 + 2 + 4
    board = cells(section(page, "Leaderboard"))
    assert board[0][:2] == ["model", "win rate"] and [row[0] for row in board[1:4]] == ["dpo", "ppo", "sft"]
    assert board[1][1].startswith("50.0 ± ")
    asked = Parsed(section(page, "The judge")).text
    assert "or (b) y better? Say." in asked and "Output (b) is output_2" in asked and "So output_2 is" in asked
    assert "the rewards add up to 0.475" in section(page, "Rollouts")
    assert "python eval.py" in section(page, "How to make it again")
    assert "beta 0.2" in section(page, "Settings")
    assert cells(section(page, "Settings"))[1] == ["beta", "0.2"]              # what is not a default comes first


def test_the_report_says_why_there_is_no_length_controlled_win_rate(made):
    row = {"win_rate": 100., "standard_error": 0., "avg_length": 9, "lc_unknown": "every answer has won"}
    result = {"rows": {"dpo": row}, "compared": [], "by_dataset": {}, "position": {}, "flips": {}, "ratings": [],
              "matrix": None}
    run = run_report.Run("", result, {}, [], {}, None)
    assert "LC of dpo cannot be told: every answer has won" in "".join(run_report.leaderboard(run))


def test_what_is_missing_or_broken_is_left_out(made):
    for path in made.glob("*/*.jsonl"):
        path.unlink()
    (made / "best_of_n" / "curve.json").write_text("{")
    (made / "pairs" / "pairs.json").write_text("[1]")
    (made / "judge.jsonl").write_text("torn\n{\"model\": ")
    page = report_of(made)
    assert "Learning curves" not in page and "Best of n" not in page and "Tokens" not in page
    assert "AttributeError" in section(page, "Annotators")                  # [1] are no pairs: that is said, no more
    assert len(section(page, "Leaderboard")) > 1000 and "ppo" in section(page, "Leaderboard")


def test_annotations_alone_have_a_report_too(made, tmp_path):
    path = tmp_path / "alone.json"
    path.write_text((made / "dpo" / "annotations.json").read_text())
    page = report_of(path)
    assert "Leaderboard" in page and "Annotators" in page and "Learning" not in page and "Settings" not in page
    data = json.loads(re.search(r'id="answers-data">(.*?)</script>', page)[1])
    assert data["models"] == ["dpo"] and len(data["cases"]) == 12
    assert {case["kind"] for case in data["cases"]} == {"even", "odd"}
    for case in data["cases"]:
        reference, answer = case["answers"]
        i = int(re.search(r"\d+", case["asked"])[0])
        assert (reference["by"], reference["won"]) == ("reference", None) and answer["won"] == (i % 2 == 0)
        assert answer["worth"] is None and f"judge-{i % 2} prefers" in answer["verdict"]


def test_runs_that_differ_in_the_seed_are_one_report(made):
    other = made.with_name("other")
    shutil.copytree(made, other)
    for path in other.glob("*/config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 1}))
    page = report_of(made, other)
    board = cells(section(page, "Leaderboard"))
    assert board[0][:3] == ["model", "runs", "win rate"] and board[1][:3] == ["dpo", "2", "50.0 ± 0.0"]
    assert {">run<", ">other<"} <= set(re.findall(">run<|>other<", section(page, "Learning curves")))
    data = json.loads(re.search(r'id="answers-data">(.*?)</script>', page)[1])
    assert data["models"] == ["dpo (run)", "ppo (run)", "sft (run)"]
    cost = cells(section(page, "Cost"))
    assert len(cost) == 1 + 2 * 5 + 1 + 2
    assert cost[-2:] == [["dear", "4", "4,000", "40", "unknown"], ["odd", "2", "0", "0", "unknown"]]


def test_stages_come_in_the_order_in_which_they_need_each_other(made):
    assert [stage["name"] for stage in contents([made])] == ["sft", "best_of_n", "pairs", "ppo", "dpo"]
    sft, best_of_n, pairs, *_ = contents([made])
    assert len(sft["metrics"]) == 5 and len(sft["samples"]) == 2 and sft["curve"] == {} and sft["pairs"] == []
    assert best_of_n["curve"]["n"] == [1, 2, 3, 4] and len(pairs["pairs"]) == 8


def test_dollars_are_counted_for_every_reply(made):
    found = spent([made / "judge.jsonl"], {"dear": (2., 10.)}.get)
    assert found["dear"] == {"replies": 2, "prompt": 2000, "completion": 20, "dollars": pytest.approx(.0042)}
    assert found["odd"]["dollars"] is None and found["odd"]["replies"] == 1
    assert spent([made / "judge.jsonl"] * 3, {"dear": (2., 10.)}.get)["dear"]["dollars"] == pytest.approx(.0126)
    assert spent([made / "none.jsonl"], {}.get) == {}


# ---- numbers by hand -----------------------------------------------------------------------------------

def stage(**more):
    return {"run": Path("run"), "name": "s", "settings": {}, "result": {}, "curve": {}, "pairs": [], "metrics": [],
            "samples": [], **more}


def test_a_long_curve_is_means_over_equally_many_steps():
    rows = [{"step": i, "loss": float(i % 2), "odd": "text" if i else True} for i in range(4 * POINTS)]
    steps, values = run_report.curve(stage(metrics=rows), "loss")
    assert len(steps) == POINTS and (values == .5).all() and steps[:2].tolist() == [1.5, 5.5]
    steps, values = run_report.curve(stage(metrics=[*rows[:3], {"step": 3, "loss": nan}, {"step": 4}]), "loss")
    assert steps.tolist() == [0, 1, 2] and values.tolist() == [0, 1, 0]


def test_the_most_important_curves_come_first_and_unknown_ones_where_there_are_few():
    assert run_report.curves_of(stage(metrics=[{"step": 0, "lr": 1, "x": 2, "loss": 1}])) == [("loss",), ("x",)]
    dpo = ["rewards/rejected", "rewards/chosen", "rewards/margins", "rewards/accuracies", "loss", "grad_norm"]
    found = run_report.curves_of(stage(metrics=[dict.fromkeys(dpo, 1.)]))
    assert found == [("loss",), ("rewards/margins",), ("rewards/chosen", "rewards/rejected"), ("rewards/accuracies",)]
    assert run_report.curves_of(stage(metrics=[{"step": 0, "val/ratio": None}])) == []


def test_tastes_of_an_annotator_by_hand():
    long, short = "x" * 50, "y"
    records = [{"preference": 1, "is_switched": False, "output_1": long, "output_2": short},      # first, longer
               {"preference": 2, "is_switched": True, "output_1": long, "output_2": short},       # first, shorter
               {"preference": 2, "is_switched": False, "output_1": short, "output_2": long},      # second, longer
               {"preference": 1.5, "is_switched": False, "output_1": long, "output_2": short},
               {"preference": None, "is_switched": False, "output_1": long, "output_2": short},
               {"preference": 2, "output_1": short, "output_2": short + "z"}]                     # order unknown
    found = run_report.tastes(records)
    assert found["labels"] == 4 and found["second"][0] == 75
    assert found["first"][0] == pytest.approx(200 / 3) == found["longer"][0]
    assert isnan(run_report.tastes([])["second"][0])


def test_tokens_are_marked_as_the_mask_says():
    """Index t of the mask is about token t+1; the first token is never learned."""
    sample = {"tokens": ["<q>", " a", " b", "<end>", "<pad>", "<pad>"], "mask": [0, 1, 1, 0, 0], "prompt": 2,
              "length": 4, "ends": True}
    run = Run("", {}, {}, [stage(samples=[sample, {"instruction": "no tokens"}])], {}, None)
    html = "".join(run_traces.tokens(run))
    assert re.findall(r'<span class="([^"]*)">(.*?)</span>', html) == [
        ("", "&lt;q&gt;"), ("", " a"), ("learned", " b"), ("learned end", "&lt;end&gt;"),
        ("padding", "&lt;pad&gt; × 2")]


def test_a_rollout_shows_each_token_of_the_answer_with_its_numbers():
    sample = {"step": 3, "tokens": ["<q>", " a", " b", "<end>"], "mask": [0, 1, 1], "prompt": 2, "length": 4,
              "ends": True, "scores": [.5, 1.5], "kl": [0, .25, -.5], "advantage": [0, 2., -1.]}
    html = "".join(run_traces.rollouts(Run("", {}, {}, [stage(samples=[sample])], {}, None)))
    assert cells(html) == [["token", "KL", "advantage"], [" b", "0.250", "2.000"], ["&lt;end&gt;", "−0.500", "−1.000"]]
    assert "the score is 0.500, the KL -0.250 nats" in html and "the mean of all is 1.000" in html
    assert "price of the KL" not in html                    # these rollouts have no reward per token


def test_many_instructions_are_drawn_by_their_hash_and_few_are_all_shown():
    def drawn(n, offset=0):
        records = [annotation(i, "m", 2) for i in range(offset, n)]
        html = "".join(run_report.answers(Run("", {"rows": {"m": {}}}, {"m": records}, [], {}, None)))
        return {case["asked"] for case in json.loads(re.search(r'-data">(.*?)</script>', html)[1])["cases"]}
    assert len(drawn(100)) == 100 and len(drawn(500)) == run_report.SHOWN
    assert len(drawn(500) & drawn(500, 10)) > run_report.SHOWN - 10        # the others stay when some are gone


# ---- the page in a browser -----------------------------------------------------------------------------

def troubles(page):
    """What a browser complains about, and what it asks of the network."""
    found = []
    for event in page.events:
        kind, about = event["method"], event["params"]
        if kind == "Runtime.exceptionThrown" or kind == "Log.entryAdded" and about["entry"]["level"] == "error":
            found.append(about)
        if kind == "Network.requestWillBeSent" and not about["request"]["url"].startswith(("file:", "data:")):
            found.append(about["request"]["url"])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_in_a_browser(made, tmp_path):
    records = json.loads((made / "dpo" / "annotations.json").read_text())
    records[0]["output_2"], records[3]["instruction"] = HOSTILE.replace("\ud83d", ""), "Say 3.\n\n<b>zebra</b>"
    (made / "dpo" / "annotations.json").write_text(json.dumps(records))
    report_of(made, "--any_reference")
    with browser(tmp_path / "profile") as page:
        for domain in ("Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.look(1280)
        page.call("Page.navigate", url=(tmp_path / "out" / "report.html").as_uri())
        page.wait("document.readyState === 'complete' && document.getElementById('found')")
        assert page.js("document.title") != "hacked" and page.js("[...document.querySelectorAll('img')].length") == 0
        assert page.js("[...document.querySelectorAll('svg')].every(svg => svg.getBoundingClientRect().height > 50)")
        search(page)
        assert page.js(OVERLAPPING) == []
        for width in (390, 1280):
            for dark in (False, True):
                page.look(width, dark=dark)
                assert page.js("document.documentElement.scrollWidth <= innerWidth")
                ink, paper = (page.js(f"getComputedStyle(document.body).{key}") for key in ("color", "backgroundColor"))
                light = [np.mean([int(x) for x in re.findall(r"\d+", each)[:3]]) for each in (ink, paper)]
                assert (light[0] > light[1]) == dark and abs(light[0] - light[1]) > 150
        assert troubles(page) == []


# Pairs of texts in a figure that overlap, and texts that its edges cut, as [text, ""].
OVERLAPPING = """[...document.querySelectorAll('svg')].flatMap(svg => {
    const edge = svg.getBoundingClientRect(), boxes = [...svg.querySelectorAll('text')].map(text =>
        [text.textContent, text.getBoundingClientRect()]);
    const cut = boxes.filter(([_, box]) => box.left < edge.left - 1 || box.right > edge.right + 1 ||
                                           box.top < edge.top - 1 || box.bottom > edge.bottom + 1);
    const pairs = boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([b, other]) =>
        Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1 &&
        Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 4).map(([b, _]) => [a, b]));
    return [...cut.map(([a, _]) => [a, ""]), ...pairs]; })"""


def search(page):
    """Search, filter by kind and by winner, and show more."""
    def found():
        return page.js("document.getElementById('found').textContent")

    def choose(id, value):
        page.js(f"{{ const field = document.getElementById('{id}'); field.value = {json.dumps(value)}; "
                "field.dispatchEvent(new Event('input')); }")
    shown = "document.querySelectorAll('.case').length"
    assert found() == "13 instructions" and page.js(shown) == 8
    page.js("document.getElementById('more').click()")
    assert page.js(shown) == 13 and page.js("document.getElementById('more').hidden")
    choose("search", "ZEBRA <b>")
    assert found() == "1 of 13 instructions"
    assert "<b>zebra</b>" in page.js("document.querySelector('.asked').textContent")
    choose("search", "")
    choose("kind", "odd")
    assert found() == "7 of 13 instructions"
    choose("winner", "+ppo")
    assert found() == "2 of 13 instructions"                # of 1, 3, 5, ... those that three divides
    assert page.js("[...document.querySelectorAll('.won b')].filter(b => b.textContent === 'ppo').length") == 2
    choose("kind", "")
    choose("winner", "-sft")
    assert found() == "9 of 13 instructions"
    choose("winner", "")


