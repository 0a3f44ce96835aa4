"""The server as its clients see it: OpenAI's own client and plain HTTP against sampler.sample and forward passes."""
import json
import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import requests
import tiny
import torch
import toy
from commands import ROOT, child, command, refused, until
from hypothesis import given, settings
from hypothesis import strategies as st

import serve
from data import choices, protocol
from data.text import Text, parted
from rlhf import config, policy, sampler, sft, writer
from rlhf.config import BASE

torch.set_num_threads(1)
QUESTIONS = [toy.sentence(ids) for ids in tiny.texts([3, 9, 1, 5, 2, 7])]
BARN = Text(BASE)


def stage(folder, kind):
    """A stage as farm.py leaves it, and its settings."""
    toy.run_folder(folder, kind)
    cfg = toy.settings(folder, kind, sft.Config)
    (cfg.dir() / "config.json").write_text(json.dumps({**asdict(cfg), "id": "an id", "needs": {}}))
    return cfg


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return stage(tmp_path_factory.mktemp("run"), "lora")


@pytest.fixture(scope="module")
def url(run):
    """A server of the tiny stage `sft`, which has learnt adapters, with four slots."""
    with serve.serving(run.dir(), slots=4) as url:
        yield url


@pytest.fixture
def client(url):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)


@pytest.fixture
def endless(monkeypatch):
    """Answers of any checkpoint that is loaded now end by their limit only."""
    class Endless(Text):
        stops = [10_000]
    monkeypatch.setattr(config, "Text", Endless)


def post(url, path="/chat/completions", **body):
    return requests.post(url + path, json=body, timeout=60)


def health(url):
    return requests.get(url.removesuffix("/v1") + "/health", timeout=60).json()


def ask(url, question, **body):
    """The texts of a chat's answers."""
    reply = post(url, messages=[{"role": "user", "content": question}], **body).json()
    return [choice["message"]["content"] for choice in reply["choices"]]


def events(reply):
    """The documents of a stream."""
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def spoken(text, ids):
    """What a response says, without the token that ended it (which is a word in the tiny vocabulary)."""
    return text.decode(ids[:-1] if ids[-1] in text.stops else ids)


def ending(ids):
    return "stop" if ids[-1] in toy.STOPS else "length"


def lively(cfg, question, **how):
    """A seed with which no answer to the question is shorter than five tokens."""
    return next(seed for seed in range(1000) if min(map(len, sampled(cfg, question, seed=seed, **how)[1])) > 4)


def sampled(cfg, question, **how):
    """The texts and ids that sampler.sample writes for the stage in training."""
    model, text = policy.load(cfg, "sft"), toy.text(cfg)
    rows = sampler.sample(model, [text.prompt({"instruction": question})], text.stops, **how)
    return [spoken(text, response) for _, response in rows], [response for _, response in rows]


# --- answers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_chat_says_what_a_trained_stage_sampled(kind, tmp_path):
    """Greedy and drawn, more answers than slots, the length that the stage was trained with if none is asked for."""
    cfg = stage(tmp_path, kind)
    with serve.serving(cfg.dir(), slots=2) as url:
        for question in QUESTIONS:
            greedy, _ = sampled(cfg, question, max_new_tokens=9, temperature=0)
            assert ask(url, question, max_tokens=9, temperature=0) == greedy
            drawn, _ = sampled(cfg, question, max_new_tokens=cfg.max_new_tokens, seed=5, n=3)
            assert ask(url, question, seed=5, n=3) == drawn
    other = policy.fresh(toy.settings(tmp_path, kind, sft.Config), "base")      # so that the test sees what was learnt
    text = toy.text(cfg)
    rows = sampler.sample(other, [text.prompt({"instruction": q}) for q in QUESTIONS], text.stops, 9, temperature=0)
    assert [spoken(text, ids) for _, ids in rows] != [sampled(cfg, q, max_new_tokens=9, temperature=0)[0][0]
                                                      for q in QUESTIONS]


def test_a_peft_folder_is_served_on_the_base_that_it_names(run):
    model, cfg, settings = policy.open_checkpoint(run.dir() / "checkpoint")
    text = cfg.text()
    rows = sampler.sample(model, [text.prompt({"instruction": QUESTIONS[0]})], text.stops, 9, temperature=0)
    assert spoken(text, rows[0][1]) == sampled(run, QUESTIONS[0], max_new_tokens=9, temperature=0)[0][0]
    assert not settings and cfg.max_new_tokens == 300


def test_no_answer_depends_on_those_beside_it(run, url):
    """Ten at a time in four slots, each with its own temperature, likely tokens, seed, length, stops and log-probs."""
    r, cases = random.Random(0), []
    for i in range(40):
        how = {"max_new_tokens": r.randint(1, 30), "temperature": r.choice([0, .5, 1., 2.]), "seed": i,
               "n": r.randint(1, 6), **r.choice([{}, {"top_p": .6}, {"top_k": 3}, {"min_p": .1, "top_p": .9}])}
        cases.append((r.choice(QUESTIONS), how, {"stop": ["w3"]} if i % 5 == 0 else {"logprobs": i % 2 == 0}))

    def answers(case):
        question, how, rest = case
        asked = {name.replace("max_new_", "max_"): value for name, value in how.items()}
        return ask(url, question, **asked, **rest)
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(answers, cases))
    for (question, how, rest), texts in zip(cases, together):
        expected, _ = sampled(run, question, **how)
        assert texts == [text.split("w3")[0].strip() if "stop" in rest else text for text in expected]


def test_sixteen_requests_take_the_steps_of_one(endless, monkeypatch):
    """64 tokens each, all there before the first step: 64 steps for all, and one pass over the prompts."""
    begin, step, steps, prefills = writer.Writer.next, writer.ServingEngine.step, [], []

    def next_(self):
        with self.gate:
            self.gate.wait_for(lambda: len(self.waiting) == 16 or self.answers or self.closing)
        return begin(self)

    def begun(self, waiting):
        prefills.append(len(waiting))
        sampler.Engine.prefill(self, waiting)
    monkeypatch.setattr(writer.Writer, "next", next_)
    monkeypatch.setattr(writer.ServingEngine, "step", lambda self, width, span, *long: steps.append(width) or step(
        self, width, span, *long))
    monkeypatch.setattr(writer.ServingEngine, "prefill", begun)
    with serve.serving("barn") as url, ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda i: post(url, "/completions", prompt=f"{i} cows", max_tokens=64), range(16)))
    assert [reply.json()["usage"]["completion_tokens"] for reply in replies] == [64] * 16
    assert steps == [16] * 64 and prefills == [16]


def test_a_lone_answer_runs_in_one_slot_again_after_a_crowd(endless, monkeypatch):
    widths, step = [], writer.ServingEngine.step
    monkeypatch.setattr(writer.ServingEngine, "step", lambda self, width, span, *long: widths.append(width) or step(
        self, width, span, *long))
    with serve.serving("barn", slots=8) as url:
        body = {"prompt": "The cows", "temperature": 0, "max_tokens": 6}
        texts = [post(url, "/completions", n=n, **body).json()["choices"] for n in (1, 12, 1)]
        assert len({choice["text"] for choices in texts for choice in choices}) == 1
    assert widths == [1] * 6 + [8] * 6 + [4] * 6 + [1] * 6


# --- OpenAI's own client -----------------------------------------------------------------------------------

def test_openais_client_gets_completions_models_and_usage(run, client):
    seed = lively(run, QUESTIONS[1], max_new_tokens=12, n=2)
    texts, ids = sampled(run, QUESTIONS[1], max_new_tokens=12, seed=seed, n=2)
    said = client.chat.completions.create(model="sft", messages=[{"role": "user", "content": QUESTIONS[1]}],
                                          seed=seed, n=2, max_completion_tokens=12)
    assert [choice.message.content for choice in said.choices] == texts and said.object == "chat.completion"
    assert [choice.finish_reason for choice in said.choices] == [ending(response) for response in ids]
    assert said.usage.completion_tokens == sum(map(len, ids)) and said.usage.prompt_tokens == 9
    assert said.usage.total_tokens == 9 + sum(map(len, ids)) and said.choices[0].logprobs is None
    assert [model.id for model in client.models.list()] == [str(run.dir())] == [said.model]
    raw = client.completions.create(model=str(run.dir()), prompt=QUESTIONS[1], seed=seed, max_tokens=12, n=2,
                                    logprobs=2)
    assert raw.choices[0].text.strip() == texts[0] and raw.object == "text_completion"
    assert raw.choices[0].logprobs.tokens == texts[0].split()
    for token, best in zip(raw.choices[0].logprobs.tokens, raw.choices[0].logprobs.top_logprobs, strict=True):
        assert len(best.keys() - {token}) in (1, 2) and token in best      # two, and the token itself beside them


def test_a_stream_is_the_same_answer_piece_by_piece(run, client):
    seed = lively(run, QUESTIONS[2], max_new_tokens=20, n=2)
    texts, ids = sampled(run, QUESTIONS[2], max_new_tokens=20, seed=seed, n=2)
    chunks = list(client.chat.completions.create(
        model="sft", messages=[{"role": "user", "content": QUESTIONS[2]}], seed=seed, n=2, max_tokens=20, stream=True,
        stream_options={"include_usage": True}))
    *said, last = chunks
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in said if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and not mine[0].delta.content
        assert "".join(choice.delta.content or "" for choice in mine) == texts[index]
        assert [choice.finish_reason for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == ending(ids[index])
        assert len(mine) > 3                            # its beginning, and some looks of the engine
    assert last.choices == [] and last.usage.completion_tokens == sum(map(len, ids))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_are_the_models_whatever_the_temperature(run, client, stream):
    question, model = QUESTIONS[3], policy.load(run, "sft")
    seed = lively(run, question, max_new_tokens=15, temperature=2.)
    said = client.chat.completions.create(
        model="sft", messages=[{"role": "user", "content": question}], seed=seed, max_tokens=15, temperature=2,
        logprobs=True, top_logprobs=7, stream=stream)
    entries = [entry for chunk in (said if stream else [said]) if chunk.choices[0].logprobs
               for entry in chunk.choices[0].logprobs.content]
    _, (response,) = sampled(run, question, max_new_tokens=15, seed=seed, temperature=2.)
    response = [token for token in response if token not in toy.STOPS]
    assert [entry.token for entry in entries] == [f"w{token}" for token in response] and len(response) > 3
    prompt = toy.text(run).prompt({"instruction": question})
    with torch.no_grad(), model.gpt.using(model.role):
        logp = model.gpt(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1].log_softmax(-1)
    for row, token, entry in zip(logp, response, entries, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4) and bytes(entry.bytes) == b"w%d" % token
        best = row.topk(7)
        assert [top.token for top in entry.top_logprobs] == [f"w{token}" for token in best.indices.tolist()]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_openais_client_understands_refusals(client):
    openai = pytest.importorskip("openai")
    messages = [{"role": "user", "content": "w1"}]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=messages)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="sft", messages=[{"role": "user", "content": "w1 " * 3000}])
    assert caught.value.code == "context_length_exceeded"


# --- tokens become text ------------------------------------------------------------------------------------

def answer(chat=True, stops=(), prompt=(5,), prompt_text=""):
    request = SimpleNamespace(chat=chat, stops=list(stops), logprobs=False, top=0, echo=False)
    model = SimpleNamespace(text=BARN, spell=choices.speller(BARN.tokenizer))
    return choices.Answer(request, 0, list(prompt), [], model, prompt_text)


def fed(answer, ids, portions):
    """The pieces of text that come when ids arrive in portions."""
    return [text for _, text in parts(answer, ids, portions)]


def parts(answer, ids, portions):
    """The pieces of thought and of text that come then."""
    pieces = []
    while not answer.finish:
        size = portions.draw(st.integers(1, 4))
        pieces.append(answer.take(ids[:size], [], len(ids) <= size)[:2])
        ids = ids[size:]
    return pieces


TEXTS = st.text(alphabet="ab \n\u00e9\u20ac\U0001f404", min_size=1, max_size=25)
RANDOM_IDS = st.lists(st.integers(4, BARN.tokenizer.get_vocab_size() - 1) | st.integers(4, 260), min_size=1,
                      max_size=25)


@given(st.data(), RANDOM_IDS | TEXTS.map(lambda text: BARN.tokenizer.encode(text).ids), st.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_text_and_no_character_comes_in_halves(data, ids, ends):
    """Any bytes: valid characters of up to four tokens, and what is no UTF-8 at all."""
    pieces = fed(answer(), [*ids, BARN.eos] if ends else ids, data)
    assert "".join(pieces) == BARN.decode(ids)


TAGGED = st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "a", " ", "\n"]), max_size=12).map("".join)


@given(st.data(), TAGGED, st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_of_a_thought_are_never_pieces_of_the_answer(data, text, opened):
    """A tag may come in several tokens, and what looks like its beginning may be none."""
    ids = BARN.tokenizer.encode(text).ids
    pieces = parts(answer(prompt_text="The cow? <think>\n" * opened), ids, data)
    assert tuple(map("".join, zip(*pieces))) == parted(text, opened)


@given(st.data(), TEXTS, st.lists(st.text(alphabet="ab \u20ac", min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_stop_string_ends_an_answer_and_no_part_of_it_is_ever_seen(data, text, stops):
    ids = BARN.tokenizer.encode(text).ids
    whole, one = BARN.tokenizer.decode(ids), answer(chat=False, stops=stops, prompt=[])
    pieces = fed(one, ids, data)
    ends = [next(i for i in range(len(ids) + 1) if stop in BARN.tokenizer.decode(ids[:i])) for stop in stops
            if stop in whole]
    if not ends:
        assert "".join(pieces) == whole and one.finish == "length" and one.count == len(ids)
        return
    first = BARN.tokenizer.decode(ids[:min(ends)])
    assert "".join(pieces) == first[:min(first.find(stop) for stop in stops if stop in first)]
    assert (one.finish, one.count, one.dropped) == ("stop", min(ends), True)


def test_a_raw_completion_goes_on_where_the_prompt_ends():
    """Even inside a character."""
    ids = BARN.tokenizer.encode("a \u20ac b").ids
    for i in range(1, len(ids)):
        _, text, _ = answer(chat=False, prompt=ids[:i]).take(ids[i:], [], True)
        assert BARN.tokenizer.decode(ids[:i]).rstrip("\ufffd") + text == BARN.tokenizer.decode(ids)


def test_tokens_are_spelled_in_bytes():
    text, spell = "The cow \u00e9\u20ac\U0001f404\n", choices.speller(BARN.tokenizer)
    ids = BARN.tokenizer.encode(text).ids
    assert b"".join(map(spell, ids)) == BARN.tokenizer.decode(ids).encode()
    cow = ids[[spell(i)[:1] for i in ids].index(b"\xf0")]
    entry = answer().entry(cow, (-1., (), ()))
    assert entry["token"] == "\\xf0" and entry["bytes"] == [0xf0]
    pieces = SimpleNamespace(decoder=None, id_to_token=["\u2581the", "<0xE2>", None].__getitem__)
    assert [*map(choices.speller(pieces), range(3))] == [b" the", b"\xe2", b""]


# --- prompts -----------------------------------------------------------------------------------------------

def prompt(text, *messages):
    body = {"messages": [dict(zip(("role", "content"), each)) for each in messages]}
    return text.encode(protocol.conversation(body, SimpleNamespace(text=text, characters=1000)))


def test_messages_become_the_prompt_of_training():
    plain = Text(BASE)
    plain.template = None
    asked = "Name a cow."
    for text in (BARN, plain):
        expected = text.prompt({"instruction": asked})
        assert prompt(text, ("user", asked)) == expected
        parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a cow."}]
        assert prompt(text, ("user", parts)) == expected
    assert prompt(plain, ("developer", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", asked)) == \
        plain.prompt({"instruction": f"Be brief.\n\n{asked}"})
    assert prompt(BARN, ("user", "Hello"), ("assistant", "Hi"), ("user", asked)) == \
        BARN.tokenizer.encode("<user>Hello<assistant>Hi<end><user>Name a cow.<assistant>").ids


# --- refusals and faults -----------------------------------------------------------------------------------

HELLO = {"messages": [{"role": "user", "content": "w1"}]}


@pytest.mark.parametrize("body, status, param", [
    (b"{", 400, None), (b"[]", 400, "body"), (b"[" * 100_000, 400, None), (b"\xff", 400, None), (b"", 400, None),
    ({}, 400, "messages"), ({"messages": []}, 400, "messages"), ({"messages": "hi"}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages"),
    ({"messages": [{"role": "x", "content": ""}]}, 400, "messages"),
    ({"messages": [{"role": [], "content": ""}]}, 400, "messages"), ({"messages": ["hi"]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": {"text": 1}}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
    ({**HELLO, "model": 3}, 400, "model"), ({**HELLO, "model": "sft2"}, 404, "model"),
    ({**HELLO, "temperature": -1}, 400, "temperature"), ({**HELLO, "temperature": "1"}, 400, "temperature"),
    ({**HELLO, "temperature": float("nan")}, 400, "temperature"), ({**HELLO, "n": 0}, 400, "n"),
    ({**HELLO, "n": True}, 400, "n"), ({**HELLO, "max_tokens": 0}, 400, "max_tokens"),
    ({**HELLO, "max_tokens": 2.5}, 400, "max_tokens"), ({**HELLO, "seed": 1 << 64}, 400, "seed"),
    ({**HELLO, "stop": ["a"] * 17}, 400, "stop"), ({**HELLO, "stop": [""]}, 400, "stop"),
    ({**HELLO, "stop": 1}, 400, "stop"),
    ({**HELLO, "top_logprobs": 21}, 400, "top_logprobs"), ({**HELLO, "logprobs": 1}, 400, "logprobs"),
    ({**HELLO, "stream": "yes"}, 400, "stream"), ({**HELLO, "stream_options": []}, 400, "stream_options"),
    ({**HELLO, "top_p": 1.5}, 400, "top_p"), ({**HELLO, "tools": [{}]}, 400, "tools"),
])
def test_what_makes_no_sense_is_refused_in_openais_form(url, body, status, param):
    data = body if isinstance(body, bytes) else json.dumps(body)
    reply = requests.post(url + "/chat/completions", data=data, timeout=60)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert error["message"] and "code" in error


def test_what_is_unknown_or_neutral_is_no_reason_to_refuse(url):
    extra = {"user": "me", "metadata": {"a": 1}, "top_p": 1.0, "tools": None, "stop": None, "n": None, "seed": None,
             "presence_penalty": 0, "response_format": {"type": "text"}, "model": "sft", "max_tokens": 10 ** 12}
    assert post(url, **HELLO, **extra).status_code == 200


def test_routes_methods_and_sizes(url):
    root, chat = url.removesuffix("/v1"), url + "/chat/completions"
    assert health(url) == {"status": "ok", "slots": 4, "writing": 0, "waiting": 0}
    with requests.Session() as session:                 # on one connection: no refusal leaves half a request behind
        for method, address, status in (("GET", url + "/nothing", 404), ("POST", url + "/nothing", 404),
                                        ("GET", chat, 405), ("PUT", chat, 405), ("POST", url + "/models", 405),
                                        ("OPTIONS", chat, 405), ("POST", chat + "/?x=1", 200)):
            reply = session.request(method, address, data=json.dumps(HELLO), timeout=60)
            assert reply.status_code == status and ("error" in reply.json()) == (status != 200)
    assert requests.post(chat, data=b"x" * (serve.BODY + 1), timeout=60).status_code == 413
    assert requests.post(chat, data=iter([b"{}"]), timeout=60).status_code == 411
    with socket.create_connection(("127.0.0.1", int(root.rpartition(":")[2])), 20) as raw:
        raw.sendall(b"no HTTP at all\r\n\r\n")
        assert b'{"error": {' in raw.recv(9999)


def test_a_fault_ends_the_answers_that_it_hit_and_no_others(url, monkeypatch, capfd):
    expected, advance = ask(url, QUESTIONS[1], seed=1), writer.ServingEngine.advance

    def broken(self, *wanted):
        monkeypatch.setattr(writer.ServingEngine, "advance", advance)
        advance(self, *wanted)
        raise FloatingPointError("not finite\nat all")
    monkeypatch.setattr(writer.ServingEngine, "advance", broken)
    reply = post(url, n=9, **HELLO)
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
    assert "not finite" in reply.json()["error"]["message"]
    assert ask(url, QUESTIONS[1], seed=1) == expected
    assert health(url)["writing"] == 0
    assert capfd.readouterr().err == "serve.py: FloatingPointError: not finite\n"


def test_a_fault_within_a_stream_is_told_in_it(url, monkeypatch):
    advance, calls = writer.ServingEngine.advance, []

    def broken(self, *wanted):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("none left")
        advance(self, *wanted)
    monkeypatch.setattr(writer.ServingEngine, "advance", broken)
    reply = post(url, messages=[{"role": "user", "content": QUESTIONS[1]}], n=4, max_tokens=50, stream=True)
    *_, last = [line for line in reply.text.split("\n\n") if line]
    assert reply.status_code == 200 and "none left" in json.loads(last.removeprefix("data: "))["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(stream, endless, monkeypatch):
    """It wants 200 tokens and is gone after the first; the writer waits until this is noticed."""
    begun, gone, write = threading.Event(), threading.Event(), writer.Writer.write
    shut = serve.Server.shutdown_request

    def slowly(self, begin):
        write(self, begin)
        if begin:
            begun.set()
        elif stream:
            gone.wait(.01)                              # tokens have to come, for a stream to notice
        else:
            gone.wait(20)
    steps, step = [], writer.ServingEngine.step
    monkeypatch.setattr(writer.ServingEngine, "step", lambda *args: steps.append(1) or step(*args))
    monkeypatch.setattr(writer.Writer, "write", slowly)
    monkeypatch.setattr(serve.Server, "shutdown_request", lambda *args: gone.set() or shut(*args))
    with serve.serving("barn") as url:
        body = json.dumps({"prompt": "Cows", "max_tokens": 240, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2].removesuffix("/v1"))), 20) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            assert begun.wait(20)
        assert gone.wait(20)
        until(lambda: not health(url)["writing"])
    assert len(steps) < 200


def test_too_many_wait(monkeypatch, url, run):
    monkeypatch.setattr(writer.Writer, "submit", lambda self, request: False)
    reply = post(url, **HELLO)
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "overloaded"
    monkeypatch.undo()
    waiting = writer.Writer(None, None, most=2)
    assert [waiting.submit(SimpleNamespace(answers=[1, 2])) for _ in range(2)] == [True, False]


def test_who_waits_at_the_end_is_told(endless, monkeypatch):
    write = writer.Writer.write

    def slowly(self, begin):
        write(self, begin)
        with self.gate:
            self.gate.wait_for(lambda: self.closing, 20)
    monkeypatch.setattr(writer.Writer, "write", slowly)
    with ThreadPoolExecutor(2) as pool:
        with serve.serving("barn", slots=1) as url:
            replies = [pool.submit(post, url, max_tokens=99, **HELLO) for _ in range(2)]
            until(lambda: health(url)["waiting"] == 1)
        assert {reply.result(60).status_code for reply in replies} == {503}


# --- the command -------------------------------------------------------------------------------------------

def test_the_command_says_its_url_and_ends_quietly_with_ctrl_c():
    line = [sys.executable, "serve.py", "barn", "--port", "0", "--name", "serve:barn", "--max-new-tokens", "3"]
    with child(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        url = server.stdout.readline().strip().removeprefix("OPENAI_BASE_URL=")
        reply = post(url, "/completions", model="serve:barn", prompt="The cow", seed=0).json()
        assert reply["usage"]["completion_tokens"] <= 3 and reply["model"] == "serve:barn"
        server.send_signal(signal.SIGINT)
        assert (*server.communicate(timeout=20), server.returncode) == ("", "", 130)


def test_a_command_that_cannot_serve_says_why_in_a_sentence(run, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(command("serve.py", "barn", "--port", taken.getsockname()[1]), 2, "cannot listen on port", "in use")
    refused(command("serve.py", tmp_path / "nothing", "--port", 0), 2, "there is no folder .*nothing")
    refused(command("serve.py", run.out, "--port", 0), 2, "is a whole run", "reward|sft")
    refused(command("serve.py", run.dir().parent / "reward" / "checkpoint", "--port", 0), 2, "reward model")
    refused(command("serve.py", "barn", "--slots", -1), 2, "must be 0 or more")
    refused(command("serve.py", "barn", "--slotz", 1), 2, "there is no")

    def full(*how):
        raise MemoryError
    monkeypatch.setattr(policy, "load_base", full)
    refused(command("serve.py", "barn", "--port", 0), 4, "out of memory")
