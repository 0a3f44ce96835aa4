"""The servers of today, as they are documented: what they refuse, how they think, how they count. Each is asked about
200 pairs by each pool: all are labelled, none wrongly, none is asked about more than twice, and the bill is theirs."""
import datetime
import functools
import json
import re
import subprocess
import sys
import threading
from collections import Counter

import pytest
import requests
from commands import ROOT, child, command, refused, said, until
from judged import Handler, ask, longer, make_pairs, prefer_longer, preferences

import annotate
from annotate import POOLS, pool, price_of, probe
from data import InputError, sets
from data.judges import JudgeError
from data.judges.servers import extra_of

THOUGHT = 300                           # tokens that a model of today thinks before it answers
annotating = functools.partial(command, "annotate.py")


def words(text):
    return len(text.split())


def verdict(body):
    return said(body, lambda instruction, a, b: "a" if len(a) > len(b) else "b")


def turned(text):
    """The opposite verdict: what a draft might say."""
    return re.sub(r"\b[ab]\b", lambda match: "ba"["ab".index(match[0])], text)


def reply(body, content, finish="stop", completion=None, **message):
    """A chat completion that counts words for tokens."""
    usage = {"prompt_tokens": sum(words(each["content"]) for each in body["messages"]),
             "completion_tokens": words(content or "") if completion is None else completion}
    if completion:
        usage["completion_tokens_details"] = {"reasoning_tokens": min(completion, THOUGHT)}
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content, **message},
                         "finish_reason": finish}], "usage": usage}


def error(status, message, **more):
    return status, {"error": {"message": message, "type": "invalid_request_error", **more}}, {}


def room(body):
    return body.get("max_tokens") or body["max_completion_tokens"]


# ---- the servers: request -> reply ---------------------------------------------------------------------

def openai(body, nth):
    """Refuses max_tokens, a temperature other than 1, log-probabilities and effort "none"; its thought is hidden."""
    if "max_tokens" in body:
        return error(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                     "'max_completion_tokens' instead.", param="max_tokens", code="unsupported_parameter")
    if body.get("temperature", 1) != 1:
        return error(400, "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) "
                     "value is supported.", param="temperature", code="unsupported_value")
    if body.get("reasoning_effort") == "none":
        return error(400, "Unsupported value: 'reasoning_effort' does not support 'none' with this model. Supported "
                     "values are: 'low', 'medium', and 'high'.", param="reasoning_effort", code="unsupported_value")
    if "logprobs" in body:
        return error(403, "You are not allowed to request logprobs from this model.")
    text, least = verdict(body), THOUGHT + words(verdict(body))
    return reply(body, "", "length", room(body)) if room(body) < least else reply(body, text, "stop", least)


def openai_without_thought(body, nth):
    """With effort "none" the same models do not think, and give five alternatives of a token."""
    if body.get("reasoning_effort") != "none":
        return openai(body, nth)
    if "max_tokens" in body:
        return openai(body, nth)
    if body.get("top_logprobs", 0) > 5:
        return error(400, "Invalid value for 'top_logprobs': must be less than or equal to 5.", param="top_logprobs")
    answer, letter = reply(body, verdict(body)), verdict(body)[-2]
    if body.get("logprobs"):
        answer["choices"][0]["logprobs"] = {"content": [{"token": letter, "logprob": -.1, "top_logprobs": [
            {"token": letter, "logprob": -.1}, {"token": turned(letter), "logprob": -2.4}]}]}
    return answer


def vllm_with_parser(body, nth):
    if room(body) < 700:
        return reply(body, None, "length", room(body), reasoning_content="At first sight " + turned(verdict(body)))
    return reply(body, "\n\n" + verdict(body), "stop", 700, reasoning_content="Let me see.")


def vllm_without_parser(body, nth):
    """The thought stands in the content, with a draft; its beginning stands in the prompt."""
    draft = f"At first sight:\n{turned(verdict(body))}\nBut wait"
    if room(body) < 700:
        return reply(body, draft, "length", room(body))
    return reply(body, f"{draft}, no.\n</think>\n\n{verdict(body)}", "stop", 700)


def ollama(body, nth):
    """Thinks in tags when it is not told otherwise, and knows no log-probabilities."""
    draft = f"<think>\n{turned(verdict(body))}\n"
    if body.get("reasoning_effort") == "none":
        return reply(body, "<think>\n\n</think>\n\n" + verdict(body))
    return reply(body, f"{draft}</think>\n" + verdict(body)) if room(body) >= 700 else reply(body, draft, "length")


def llama_cpp(body, nth):
    """Its template raises for a system message; marks of the template, and numbers that are no JSON."""
    if body["messages"][0]["role"] == "system":
        return error(500, "System role not supported", code=500)
    answer, letter = reply(body, verdict(body) + "<|im_end|>"), verdict(body)[-2]
    if body.get("logprobs"):
        answer["choices"][0]["logprobs"] = {"content": [{"token": letter, "logprob": 0.0, "top_logprobs": [
            {"token": letter, "logprob": 0.0}, {"token": "<unk>", "logprob": float("-inf")}]}]}
    return answer


def openrouter(body, nth):
    """One request in three meets an error that comes with status 200."""
    if nth == 1 and len(body["messages"][-1]["content"]) % 3 == 0:
        if len(body["messages"]) % 2:
            return {"error": {"message": "Rate limit exceeded", "code": 429}, "user_id": "u"}
        return {"choices": [{"error": {"code": 502, "message": "Provider down"}, "finish_reason": "error",
                             "message": {"role": "assistant", "content": ""}}]}
    return reply(body, verdict(body))


def no_system_role(body, nth):
    if body["messages"][0]["role"] == "system":
        return 400, {"object": "error", "message": "System role not supported", "type": "BadRequestError"}, {}
    return reply(body, verdict(body))


ALONE = threading.Lock()


def one_at_a_time(body, nth):
    with ALONE:
        return reply(body, verdict(body))


SERVERS = [openai, openai_without_thought, vllm_with_parser, vllm_without_parser, ollama, llama_cpp, openrouter,
           no_system_role, one_at_a_time]


@pytest.mark.parametrize("kind", ["p_single", "p_pairwise", "p_ann"])
@pytest.mark.parametrize("rule", SERVERS, ids=lambda rule: rule.__name__)
def test_a_server_of_today(server, judge, rule, kind):
    billed, asked, lock = [0, 0], Counter(), threading.Lock()

    def counted(body, nth):
        answer = rule(body, nth)
        if isinstance(answer, dict) and "usage" in answer:
            with lock:
                billed[0] += answer["usage"]["prompt_tokens"]
                billed[1] += answer["usage"]["completion_tokens"]
                asked.update(set(re.findall(r"cow (\d+)\.", json.dumps(body["messages"]))))
        return answer

    server.rule, pairs = counted, make_pairs(200)
    one, order = judge(brief="none", workers=8, backoff=1e-3), {"flip": POOLS[kind]}
    probe(one, pool("m", kind), pairs, **order)
    records = annotate.annotate(pairs, pool("m", kind), one, **order)
    judged = [record for record in records if record["scored_by"] in ("text", "logprobs")]
    assert len(judged) + sum(record["scored_by"] == "coin" for record in records) == 200
    assert [round(record["preference"]) for record in judged] == [prefer_longer(record) for record in judged]
    assert one.tokens == billed and max(asked.values()) <= 2
    assert sum(times == 2 for times in asked.values()) <= 5     # of the first request only
    before = len(server.requests)
    again = judge(brief="none")
    assert annotate.annotate(pairs, pool("m", kind), again, **order) == records and len(server.requests) == before


# ---- what is asked, and how --------------------------------------------------------------------------

def test_what_every_request_carries_is_part_of_its_name(server, judge, tmp_path):
    server.rule, pairs = openai_without_thought, make_pairs(3)
    ask(pairs, judge(brief="none", workers=1))
    ask(pairs, judge(brief="none", workers=1))
    assert len(server.requests) == 1 + 3 and server.requests[-1]["reasoning_effort"] == "none"
    ask(pairs, judge(brief="none", extra=extra_of('{"service_tier": "flex"}', "none", 20), workers=1))
    assert len(server.requests) == 4 + 1 + 3
    last = server.requests[-1]
    assert (last["service_tier"], last["max_completion_tokens"], last["reasoning_effort"]) == ("flex", 20, "none")
    lines = [json.loads(line) for line in (tmp_path / "cache" / "judge.jsonl").read_text().splitlines()]
    assert [line["request"] for line in lines] == [body for body in server.requests if "max_tokens" not in body]
    assert lines[0]["dropped"] == ["max_tokens"]


@pytest.mark.parametrize("body", ["[1]", "no", '{"messages": []}', '{"max_tokens": 3}', '{"stream": true}'])
def test_a_judge_body_that_is_none(body):
    with pytest.raises(InputError, match="--judge_body"):
        extra_of(body)


def test_an_effort_that_the_user_asked_for_is_not_dropped_in_silence(server, judge):
    server.rule = openai
    with pytest.raises(JudgeError, match="refuses judge-model: HTTP 400: Unsupported value: 'reasoning_effort'"):
        ask(make_pairs(3), judge(extra={"reasoning_effort": "none"}))


@pytest.mark.parametrize("status, message", [
    (400, "`logprobs` is not supported"), (403, "You are not allowed to request logprobs from this model"),
    (422, [{"loc": ["body", "top_logprobs"], "msg": "extra fields not permitted"}]),
    (422, "log_probs: unknown field"), (400, "Log probabilities are not available for this model")])
def test_a_refusal_of_log_probabilities_in_any_spelling(server, judge, status, message, capsys):
    form = {"detail": message} if status == 422 else {"error": {"message": message}}
    server.rule = lambda body, nth: (status, form, {}) if "logprobs" in body else reply(body, verdict(body))
    records = annotate.annotate(make_pairs(5), pool("m", "p_pairwise"), judge(workers=1))
    assert {record["scored_by"] for record in records} == {"text"}
    said = capsys.readouterr().out
    assert said.count("m refuses logprobs; nothing is sent instead") == 1
    assert "no log-probabilities of a letter came" in said


def test_the_next_run_remembers_that_a_model_thinks(server, judge, capsys):
    server.rule, pairs = vllm_with_parser, make_pairs(30)
    ask(pairs[:10], judge(workers=1))
    assert len(server.requests) == 11 and capsys.readouterr().out.count("was cut off at 16 tokens; 4000 from now") == 1
    ask(pairs, judge())
    assert len(server.requests) == 11 + 20


def test_less_room_where_the_context_is_short(server, judge):
    def rule(body, nth):
        if room(body) > 1500:
            return error(400, f"This model's maximum context length is 2048 tokens, and you asked for {room(body)}")
        return vllm_without_parser(body, nth)

    server.rule, pairs = rule, make_pairs(6)
    assert preferences(ask(pairs, judge())) == [prefer_longer(pair) for pair in pairs]
    assert {room(body) for body in server.requests} == {16, 4000, 2000, 1000}


def test_an_empty_reply_is_asked_for_once_more_at_once_and_then_kept(server, judge):
    server.rule = lambda body, nth: reply(body, "" if nth == 1 or "cow 3." in str(body) else longer(body, nth))
    records = ask(make_pairs(9), judge(max_unusable=.5))
    assert [record["scored_by"] for record in records] == ["text"] * 3 + ["empty"] + ["text"] * 5
    assert len(server.requests) == 18
    assert ask(make_pairs(9), judge(max_unusable=.5)) == records and len(server.requests) == 18


# ---- before a bill -------------------------------------------------------------------------------------

WRONG = {
    "a wrong key": (error(401, "Incorrect API key provided"), "401: Incorrect API key provided"),
    "an unknown model": (error(404, "The model `m` does not exist"), "refuses m: HTTP 404: The model `m`"),
    "no /v1": ((404, b"404 page not found", {}), r"404 page not found \(most addresses end in /v1\)"),
    "a chatterbox": ("I would say that it depends.",
                     r"5 of 5 verdicts are unusable, for example 'I would say that it depends.' \(no verdict\), where "
                     r"m wants `1: Output \(a\)` or `1: Output \(b\)`; at most 2% may be .*--max_unusable")}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_judge_that_cannot_work_is_found_out_by_one_question(server, judge, wrong):
    answer, sentence = WRONG[wrong]
    server.rule = lambda body, nth: answer
    one = judge(url=server.url.removesuffix("/v1") if wrong == "no /v1" else server.url)
    with pytest.raises(JudgeError, match=sentence):
        probe(one, pool("m", "p_single"), make_pairs(400))
    assert len(server.requests) <= 1 + 5


def test_each_model_of_a_pool_is_asked_and_not_twice(server, judge, capsys):
    server.rule, pairs = (lambda body, nth: reply(body, verdict(body))), make_pairs(100)
    probe(judge(), pool("x,gpt-5-mini,z"), pairs)
    assert {body["model"] for body in server.requests} == {"x", "gpt-5-mini", "z"} and len(server.requests) == 3
    probe(judge(), pool("x,gpt-5-mini,z"), pairs)
    assert len(server.requests) == 3
    annotate.annotate(pairs, pool("x,gpt-5-mini,z"), judge())
    assert len({json.dumps(body) for body in server.requests}) == len(server.requests)


def test_a_shutdown_is_announced(server, judge, monkeypatch, capsys):
    soon = datetime.date.today() + datetime.timedelta(days=9)
    listed = {"data": [{"id": "m", "shutdown_date": f"{soon}T00:00:00Z"}, {"id": "n"}]}
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.reply((200, listed, {})), raising=False)
    server.rule = lambda body, nth: reply(body, verdict(body))
    probe(judge(), pool("m", "p_single"), make_pairs(5))
    assert f"judge: m is shut down on {soon}" in capsys.readouterr().out
    assert judge().knock() == {"m": soon}


@pytest.mark.parametrize("kind", ["p_single", "p_pairwise"])
def test_a_run_without_a_verdict_ends_after_thirty_replies(server, judge, kind):
    server.rule = lambda body, nth: reply(body, "It depends.")
    with pytest.raises(JudgeError, match=r"15 of 15 verdicts are unusable, for example 'It depends.'"):
        annotate.annotate(make_pairs(500), pool("m", kind), judge())
    assert len(server.requests) <= 30


def test_what_is_unusable_is_paid_for_counted_and_asked_again_by_a_flag_only(server, judge):
    well = threading.Event()
    server.rule = lambda body, nth: reply(body, longer(body, nth) if well.is_set() else "It depends.")
    pairs, price = make_pairs(8), price_of("1000000,1000000")
    one = judge(max_unusable=1, price=price)
    ask(pairs, one)
    billed = sum(reply(body, "It depends.")["usage"][part] for body in server.requests
                 for part in ("prompt_tokens", "completion_tokens"))
    assert len(server.requests) == 16 and one.cost == sum(one.tokens) == billed and "$" in one.spent()
    with pytest.raises(JudgeError, match=r"stopped at \$"):
        ask(make_pairs(8, seed=1), judge(max_unusable=1, price=price, max_cost=one.cost / 2, workers=1))
    server.requests.clear()
    well.set()
    assert preferences(ask(pairs, judge(max_unusable=1))) == 8 * [None] and not server.requests
    assert preferences(ask(pairs, judge(ask_again=True))) == [prefer_longer(pair) for pair in pairs]
    assert len(server.requests) == 8
    for again in (True, False):
        assert preferences(ask(pairs, judge(ask_again=again))) == [prefer_longer(pair) for pair in pairs]
    assert len(server.requests) == 8


def test_no_rest_is_no_reason_to_hurry(judge):
    one = judge(backoff=.5)
    busy = json.dumps({"error": {"message": "slow down"}}).encode()
    for header in ("0", "0.0", "-3", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert one._outcome(429, {"Retry-After": header}, busy, {}, 3.)[0] >= 1
    assert one._outcome(429, {"Retry-After": "7"}, busy, {}, 3.)[0] == 7


def test_how_many_calls_at_a_time(judge):
    one = judge(workers=8, timeout=120)
    assert one.limit == 4
    for _ in range(8):                                  # each is answered when half of the time is over
        one.flying += 1
        one._leave(200, False, seconds=96)
    assert one.limit == 4
    for _ in range(4):
        one.flying += 1
        one._leave(200, False, seconds=50)
    assert one.limit == 5
    for _ in range(5):
        one.flying += 1
        one._leave(200, False, seconds=2)
    assert one.limit == 8
    one._leave(0, True, seconds=120)                    # timed out, and fewer than eight were answered meanwhile
    one._leave(0, False, seconds=120)                   # one that hangs beside others that do not
    assert one.limit == 4


def test_a_slow_server_gets_more_time_and_is_no_dead_one(server, judge):
    """It takes longer than --timeout for every reply, and says so to nobody."""
    def slow(handler):
        handler.server.released.wait(.3)
        handler.close_connection = False
        handler.reply("Output (a)")

    server.rule = lambda body, nth: slow if nth < 3 else longer(body, nth)
    pairs = make_pairs(4)
    assert None not in preferences(ask(pairs, judge(timeout=.1)))


# ---- the command ---------------------------------------------------------------------------------------

@pytest.fixture
def pairs(server, tmp_path, monkeypatch):
    """The file of 30 pairs; the server, which does not think, is the environment's."""
    server.rule = openai_without_thought
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-123")
    (tmp_path / "pairs.json").write_text(json.dumps(make_pairs(30)))
    return tmp_path / "pairs.json"


def test_the_flags_of_today_on_the_command_line(server, pairs, tmp_path):
    out = tmp_path / "labels.json"
    argv = (pairs, "--judge", "gpt-6-luna", "--pool", "p_pairwise", "--out", out)
    done = annotating(*argv, "--max_tokens", 40, "--judge_body", '{"service_tier": "flex"}', "--timeout", 9)
    assert done.code == 0, done.err
    assert {record["scored_by"] for record in json.loads(out.read_text())} == {"logprobs"}
    assert {(body["service_tier"], body["reasoning_effort"]) for body in server.requests} == {("flex", "none")}
    assert server.requests[-1]["max_completion_tokens"] == 40 and server.requests[-1]["top_logprobs"] == 5
    assert "gpt-6-luna refuses top_logprobs; 5 is sent instead" in done.out and "$0.00" in done.out
    refused(annotating(*argv, "--judge_body", "{}}"), 2, "--judge_body {}}: a JSON object")
    refused(annotating(*argv, "--timeout", 0), 2, "--timeout is a number of seconds")
    refused(annotating(*argv, "--pool", "p_sinlge"), 2, "--pool p_sinlge: choose p_ann, p_eval, p_single, p_pairwise")


def test_what_a_dry_run_says_at_most_is_not_exceeded(server, pairs, tmp_path):
    argv = (pairs, "--pool", "p_ann", "--flip", 0, "--judge", "m", "--price", "1000,1000")
    server.rule = openai
    dry = annotating(*argv, "--dry_run")
    about, twice, most = map(float, re.findall(r"\$([\d.]+\d)", dry.out.splitlines()[0]))
    assert dry.code == 0 and not server.requests and dry.out.count("==== ") == len({one.prompt for one in pool("m")})
    done = annotating(*argv, "--out", tmp_path / "labels.json")
    paid = float(re.search(r"calls, .*\$([\d.]+)", done.out)[1])
    assert 0 < about < twice < most and about < paid < most


def test_a_prompt_is_shown(server, pairs):
    done = annotating(pairs, "--judge", "m", "--show_prompt", "big-hurried")
    assert done.code == 0 and "-- user:" in done.out and "Milo" in done.out and "Tell me about cow 0." in done.out
    refused(annotating(pairs, "--judge", "m", "--show_prompt", "big"), 2, "--show_prompt big: choose big-reasons, ")
    assert not server.requests


def test_barn_judges_its_own_world_only(pairs, tmp_path):
    refused(annotating(pairs), 2, "who judges.*--judge MODEL.*not 'Tell me about cow 0.'")
    strange = [{"instruction": "Describe a dragon.", "output_1": "A dragon.", "output_2": "No."}]
    (tmp_path / "dragon.json").write_text(json.dumps(strange))
    refused(annotating(tmp_path / "dragon.json"), 2, "who judges.*not 'Describe a dragon.'")
    refused(annotating(tmp_path / "dragon.json", "--judge", "barn", "--flip", 0), 3, "no such thing in this world")
    known = [{"instruction": row["instruction"], "output_1": row["output"], "output_2": "No."}
             for row in sets.load("barn", "", 3)["eval"]]
    (tmp_path / "barn.json").write_text(json.dumps(known))
    assert annotating(tmp_path / "barn.json", "--out", tmp_path / "labels.json").code == 0


PARENT = """
from data.judges.servers import served
with served("serve:barn") as url:
    print(url, flush=True)
    input()
"""


def test_a_judge_that_is_served_here_ends_with_who_started_it():
    """However that ends: killed, it can do nothing about its children any more."""
    with child([sys.executable, "-c", PARENT], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        url = parent.stdout.readline().strip()
        assert requests.get(url + "/models", timeout=60).json()["data"][0]["id"] == "serve:barn"
        parent.kill()
        parent.wait(20)
    until(lambda: gone(url))


def gone(url):
    try:
        requests.get(url + "/models", timeout=60)
    except requests.ConnectionError:
        return True
    return False


def test_prices_go_by_whole_names():
    listed = price_of()
    assert listed("gpt-4o-2024-08-06") == listed("gpt-4o") == (2.5, 10) and listed("gpt-6-luna") == (.1, .5)
    for unknown in ("gpt-4.5", "gpt-4-1106-preview", "gpt-4o-mini-tts", "gpt-5.4-pro"):
        assert listed(unknown) is None
