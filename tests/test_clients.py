"""What real clients send to serve.py: their requests as they were recorded, scored prompts, likely tokens, refusals.

Recorded with openai 3.57, litellm 1.110, llm 0.36, langchain_openai 1.7, lm_eval 0.4.13, alpaca_eval 0.6.6 and curl;
prompts are shortened, and ids are those of a smaller vocabulary.
"""
import math

import pytest
import requests
import tiny
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serve import BARN, events, lively, post, sampled, stage

import serve
from data.text import Text
from rlhf import policy, sampler
from rlhf.sampler import likely

torch.set_num_threads(1)
ASKED = [{"role": "user", "content": "What do cows eat?"}]
SAID = {"role": "assistant", "content": "Cows eat grass."}
DUMPED = {**SAID, "refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
SCORING = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
LANGCHAIN = {"frequency_penalty": 0, "logprobs": None, "max_tokens": 20, "n": 1, "presence_penalty": 0, "seed": None,
             "temperature": 0.7, "top_p": 1}
CHATS = {
    "openai": {"messages": ASKED, "temperature": 0},
    "openai: an answer is sent back": {"messages": [*ASKED, DUMPED, *ASKED]},
    "openai: stream": {"stream": True, "messages": ASKED, "temperature": 0},
    "litellm, hosted_vllm": {"messages": ASKED, "temperature": 0, "top_k": 5},
    "litellm: stream": {"messages": ASKED, "temperature": 0, "stream": True},
    "langchain": {"stream": False, "messages": ASKED},
    "llm": {"stream": True, "messages": ASKED, "stream_options": {"include_usage": True}},
    "lm_eval": {"messages": ASKED, "max_tokens": 12, "temperature": 0, "stop": ["\n"], "seed": 1234},
    "alpaca_eval: an answer": {"messages": [{"content": "You are a helpful assistant.", "role": "system"}, *ASKED],
                               "max_tokens": 24, "temperature": 0.7, "top_p": 1.0},
    "alpaca_eval: a verdict": {"messages": ASKED, "max_tokens": 1, "temperature": 1, "top_p": 1.0, "logprobs": True,
                               "top_logprobs": 5},
}
COMPLETIONS = {
    "openai": {"prompt": ["Cows eat", "2 + 2 ="], "max_tokens": 5, "temperature": 0},
    "openai: a score": {"prompt": "Cows eat grass", "echo": True, "logprobs": 1, "max_tokens": 0},
    "langchain": {"prompt": ["Cows eat", "2 + 2 ="], **LANGCHAIN},
    "langchain: stream": {"stream": True, "prompt": "Cows eat", **LANGCHAIN},
    "llm": {"stream": True, "prompt": "Cows eat", "stream_options": {"include_usage": True}},
    "lm_eval: texts": {"prompt": "Cows eat grass", **SCORING},
    "lm_eval: ids": {"prompt": [[50, 35, 28, 46, 31, 25, 21], [10, 80, 27]], **SCORING},
    "lm_eval: until": {"prompt": [[50, 35, 28]], "max_tokens": 12, "temperature": 0, "stop": ["\n", "<|im_end|>"],
                       "seed": 1234},
    "alpaca_eval": {"prompt": ["Cows eat", "Name a cow."], "max_tokens": 50, "temperature": 0, "top_p": 1.0},
    "curl": {"prompt": "Cows eat", "max_tokens": 4, "temperature": 0},
}


@pytest.fixture(scope="module")
def barn():
    """A server of the offline world's base, which has a real tokenizer."""
    with serve.serving("barn", slots=4, name="org/barn") as url:
        yield url


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, tmp_path_factory):
    return stage(tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture(scope="module")
def url(run):
    with serve.serving(run.dir(), slots=4) as url:
        yield url


def complete(url, **body):
    """The choices of a completion."""
    reply = post(url, "/completions", **body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


# --- requests as they come -----------------------------------------------------------------------------------

@pytest.mark.parametrize("path, body", [
    *[pytest.param("/chat/completions", body, id=name) for name, body in CHATS.items()],
    *[pytest.param("/completions", body, id=name) for name, body in COMPLETIONS.items()]])
def test_a_recorded_request_is_answered(barn, path, body):
    reply = post(barn, path, model="org/barn", **body)
    assert reply.status_code == 200, reply.text
    if body.get("stream"):
        *_, last = (event for event in events(reply) if event["choices"])
        assert last["choices"][0]["finish_reason"] in ("stop", "length")
        return
    prompt = body.get("prompt", "")
    assert len(reply.json()["choices"]) == (1 if isinstance(prompt, str) else len(prompt))


@pytest.mark.parametrize("asked", ["org/barn", "org%2Fbarn", "barn"])
def test_a_model_is_found_by_its_names(barn, asked):
    card = requests.get(f"{barn}/models/{asked}", timeout=60).json()
    assert (card["object"], card["id"]) == ("model", asked.replace("%2F", "/"))
    wrong = requests.get(f"{barn}/models/other/{asked}", timeout=60)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")


# --- several prompts -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_p": .7, "logprobs": 2}])
def test_each_prompt_of_a_list_is_answered_as_if_it_were_alone(url, run, how):
    prompts = [toy.sentence(ids) for ids in tiny.texts([3, 9, 1, 5, 5, 2, 7])]
    together = post(url, "/completions", prompt=prompts, n=2, max_tokens=9, **how).json()
    alone = [post(url, "/completions", prompt=prompt, n=2, max_tokens=9, **how).json() for prompt in prompts]
    assert [choice["index"] for choice in together["choices"]] == list(range(14))
    for i, choice in enumerate(together["choices"]):
        other = alone[i // 2]["choices"][i % 2]
        assert (choice["text"], choice["finish_reason"]) == (other["text"], other["finish_reason"])
    for kind in ("prompt_tokens", "completion_tokens"):
        assert together["usage"][kind] == sum(each["usage"][kind] for each in alone)
    ids = [run.text().plain(prompt) for prompt in prompts]
    assert [choice["text"] for choice in complete(url, prompt=ids, n=2, max_tokens=9, **how)] == \
        [choice["text"] for choice in together["choices"]]
    assert complete(url, prompt=ids[1], max_tokens=9, **how)[0]["text"] == together["choices"][2]["text"]


# --- scored prompts ------------------------------------------------------------------------------------------

def log_probs(run, ids):
    """(T - 1, V): what transformers says of the tokens of a text, where all weights were trained; else a full pass."""
    if not run.lora_rank:
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(run.dir() / "checkpoint")
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    model = policy.load(run, "sft")
    with torch.no_grad(), model.gpt.using(model.role):
        return model.gpt(torch.tensor([ids]))[0, :-1].log_softmax(-1)


def check_scores(run, ids, logprobs, top):
    expected = log_probs(run, ids)
    assert logprobs["tokens"] == [f"w{id}" for id in ids]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    rows = zip(expected, ids[1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True)
    for row, id, logp, likeliest in rows:
        assert logp == pytest.approx(row[id].item(), abs=1e-4) and likeliest[f"w{id}"] == logp
        best = row.topk(top)
        for value, index in zip(*map(torch.Tensor.tolist, best)):
            assert likeliest[f"w{index}"] == pytest.approx(value, abs=1e-4)
        assert len(likeliest) == len({id, *best.indices.tolist()})


@pytest.mark.parametrize("length", [1, 2, 40, 300])
def test_the_log_probs_of_a_prompt_are_those_of_transformers(run, url, length):
    (ids,) = tiny.texts([length])
    (choice,) = complete(url, prompt=ids, echo=True, logprobs=3, max_tokens=0)
    check_scores(run, ids, choice["logprobs"], 3)
    assert (choice["text"], choice["finish_reason"]) == (toy.sentence(ids), "length")


def test_prompts_are_scored_in_one_batch_beside_answers_that_are_written(run, url):
    """Of different lengths, the first of them shorter than two tokens, with tokens that follow."""
    prompts = tiny.texts([1, 30, 2, 7, 30, 11, 4, 5, 9])
    choices = complete(url, prompt=prompts, echo=True, logprobs=2, max_tokens=3, seed=1, n=2)
    for i, choice in enumerate(choices):
        ids = [int(token[1:]) for token in choice["logprobs"]["tokens"]]
        assert ids[:len(prompts[i // 2])] == prompts[i // 2] and len(ids) > len(prompts[i // 2])
        check_scores(run, ids, choice["logprobs"], 2)


def test_one_token_more_is_asked_for_and_comes_even_if_it_ends_the_text(run, url):
    """lm_eval takes the last log-prob of an echoed prompt for that of the token that was asked for."""
    ended = 0
    for prompt in tiny.texts([3] * 40):
        (choice,) = complete(url, prompt=prompt, **SCORING)
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompt) + 1
        ended += choice["finish_reason"] == "stop"
    assert 0 < ended < 40


def test_scores_of_a_long_prompt_come_in_parts_of_the_same(monkeypatch, url):
    (ids,) = tiny.texts([60])
    (whole,) = complete(url, prompt=ids, echo=True, logprobs=0, max_tokens=0)
    monkeypatch.setattr("rlhf.writer.SCORED", 7)
    (parts,) = complete(url, prompt=ids, echo=True, logprobs=0, max_tokens=0)
    assert parts["logprobs"]["token_logprobs"][1:] == pytest.approx(whole["logprobs"]["token_logprobs"][1:], abs=1e-5)


TALK = "<user>Caf\u00e9 \u20ac \U0001f404!<assistant>"


@pytest.mark.parametrize("prompt", ["Cows eat grass.", TALK, " two  spaces "])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_the_prompt_and_each_token_has_its_place_in_it(barn, prompt, stream):
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 5, "seed": 2}
    reply = post(barn, "/completions", stream=stream, **body)
    pieces = [event["choices"][0] for event in (events(reply) if stream else [reply.json()])]
    text = "".join(piece["text"] for piece in pieces)
    (plain,) = complete(barn, **{**body, "echo": False, "logprobs": None})
    assert text == prompt + plain["text"]
    (ids,) = complete(barn, **{**body, "prompt": BARN.plain(prompt)})
    assert ids["text"] == BARN.tokenizer.decode(BARN.plain(prompt), skip_special_tokens=False) + plain["text"]
    logprobs = {name: sum((piece["logprobs"][name] for piece in pieces), []) for name in pieces[0]["logprobs"]}
    assert len({len(values) for values in logprobs.values()}) == 1
    places = logprobs["text_offset"]
    assert places[0] == 0 and places == sorted(places) and places[-1] <= len(text)
    spaced = prompt == TALK                 # the tokenizer puts a space before each text, within a prompt only here
    for token, place in zip(logprobs["tokens"][1:], places[1:]):
        assert spaced or text[place:].startswith(token) or (token, place) == ("<end>", len(text))


def test_nothing_is_written_where_nothing_is_asked_for(barn):
    reply = post(barn, "/completions", prompt="Cows eat", max_tokens=0).json()
    assert reply["choices"][0]["text"] == "" and reply["usage"]["completion_tokens"] == 0
    (choice,) = complete(barn, prompt="Cows eat", max_tokens=0, echo=True)
    assert choice["text"] == "Cows eat" and choice["logprobs"] is None


# --- likely tokens -------------------------------------------------------------------------------------------

def by_definition(logits, top_p, top_k, min_p):
    """The ids that stay, of logits in a list, one rule after the other."""
    ranked = sorted(range(len(logits)), key=lambda id: -logits[id])[:top_k or len(logits)]
    weights = [math.exp(logits[id] - max(logits)) for id in ranked]
    total, before, kept = sum(weights), 0., []
    for id, weight in zip(ranked, weights):
        if not kept or before / total < top_p and weight >= min_p:
            kept.append(id)
        before += weight
    return set(kept)


RULES = st.tuples(st.sampled_from([1., .93, .51, .1, 0.]), st.sampled_from([0, 1, 3, 50]),
                  st.sampled_from([0., .04, .3, 1.]))


@given(st.integers(0, 10_000), st.lists(RULES, min_size=1, max_size=6), st.sampled_from([.2, 1., 4.]),
       st.sampled_from([3, 12, 1024]))
@settings(max_examples=150, deadline=None)
def test_which_tokens_stay_by_definition_and_row_by_row(seed, rules, loudness, candidates):
    """Also where the first candidates are not enough, for some rows or for all."""
    logits = torch.randn(len(rules), 20, generator=torch.Generator().manual_seed(seed)) * loudness
    top_p, top_k, min_p = (torch.tensor(rule, dtype=torch.float32)[:, None] for rule in zip(*rules))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "CANDIDATES", candidates)
        kept = likely(logits, top_p, top_k, min_p)
    for row, all_, rule in zip(kept, logits, rules):
        stay = row.isfinite()
        assert set(stay.nonzero()[:, 0].tolist()) == by_definition(all_.tolist(), *rule)
        assert torch.equal(row[stay], all_[stay])
        assert torch.equal(likely(all_[None], *rule)[0], row)


def test_which_tokens_stay_by_hand():
    logits = torch.tensor([[.1, .4, .2, .3]]).log()
    for rule, stay in (((.7, 0, 0.), [1, 3]), ((.71, 0, 0.), [1, 2, 3]), ((1., 3, 0.), [1, 2, 3]),
                       ((1., 0, .6), [1, 3]), ((.5, 2, 0.), [1]), ((.6, 2, 0.), [1, 3]), ((0., 0, 0.), [1])):
        assert likely(logits, *rule)[0].isfinite().nonzero()[:, 0].tolist() == stay, rule


@pytest.mark.parametrize("rule", [(.8, 0, 0.), (1., 7, 0.), (1., 0, .1), (.7, 9, 0.), (.9, 12, .05)])
def test_which_tokens_stay_in_transformers(rule):
    pytest.importorskip("transformers")
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = torch.randn(30, 61, generator=torch.Generator().manual_seed(1)) * 2
    expected = TopKLogitsWarper(rule[1] or 61)(None, logits)
    expected = TopPLogitsWarper(rule[0])(None, expected)
    expected = MinPLogitsWarper(rule[2])(None, expected) if rule[2] else expected
    assert torch.equal(likely(logits, *rule), expected)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0}, {"top_p": 1e-6}, {"min_p": 1}])
def test_only_the_likeliest_token_is_greedy_at_any_temperature(url, narrow):
    prompt = toy.sentence([3, 9, 40])
    (greedy,) = complete(url, prompt=prompt, max_tokens=12, temperature=0)
    (narrowed,) = complete(url, prompt=prompt, max_tokens=12, temperature=2, seed=1, **narrow)
    assert narrowed["text"] == greedy["text"]


def test_all_tokens_are_drawn_from_as_if_nothing_had_been_said(run, url):
    prompt = toy.sentence([3, 9, 40])
    seed = lively(run, prompt, max_new_tokens=12)
    how = {"prompt": prompt, "max_tokens": 12, "seed": seed}
    assert complete(url, **how, top_p=1, top_k=0, min_p=0) == complete(url, **how) == complete(url, **how, top_k=-1)
    assert complete(url, **how, top_k=61)[0]["text"] == complete(url, **how)[0]["text"]
    assert complete(url, **how, temperature=2, top_k=3)[0]["text"].strip() == sampled(
        run, prompt, max_new_tokens=12, seed=seed, temperature=2., top_k=3)[0][0]


# --- what is not done is refused -----------------------------------------------------------------------------

HELLO = {"messages": [{"role": "user", "content": "w1"}]}


@pytest.mark.parametrize("name, value", [
    ("repetition_penalty", 1.1), ("stop_token_ids", [1]), ("guided_choice", ["a"]), ("logit_bias", {"5": 1}),
    ("response_format", {"type": "json_object"}), ("tools", [{"type": "function"}]), ("tool_choice", "required"),
    ("presence_penalty", .1), ("best_of", 2), ("ignore_eos", True), ("skip_special_tokens", False), ("min_tokens", 1),
    ("enable_thinking", False), ("anything", 0), ("reasoning_effort", "high"), ("temprature", .5), ("prompt", "w1"),
    ("modalities", ["audio"]), ("n_probs", 3)])
def test_what_is_not_done_is_refused(barn, name, value):
    reply = post(barn, **HELLO, **{name: value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)
    assert reply.json()["error"]["code"] == "unsupported_value"
    assert ("did you mean temperature" in reply.text) == (name == "temprature")


@pytest.mark.parametrize("body", [
    {"repetition_penalty": 1.0, "frequency_penalty": 0, "logit_bias": {}, "best_of": 1, "tools": [], "functions": []},
    {"tool_choice": "none", "response_format": {"type": "text"}, "stop_token_ids": [], "guided_choice": None},
    {"tool_choice": "auto", "parallel_tool_calls": True, "anything": None, "suffix": "", "top_k": -1, "min_p": 0.0},
    {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "seed": 1, "stream_options": {},
     "safety_identifier": "x", "prompt_cache_key": "y"}])
def test_what_asks_for_nothing_passes(barn, body):
    reply = post(barn, max_tokens=3, **HELLO, **body)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("body, param", [
    ({"prompt": []}, None), ({"prompt": ["w1", 3]}, "prompt"), ({"prompt": [1, "w1"]}, None), ({"prompt": 3}, "prompt"),
    ({"prompt": [[1], "w1", None]}, "prompt"), ({"prompt": [[]]}, None), ({"prompt": [1, 1 << 20]}, None),
    ({"prompt": [-1]}, None), ({"prompt": [True]}, None), ({"prompt": {"text": "w1"}}, "prompt"),
    ({"prompt": ["w1"] * 600, "n": 2}, "prompt"), ({"prompt": "w1", "echo": 1}, "echo"),
    ({"prompt": "w1", "logprobs": True}, "logprobs"), ({"prompt": "w1", "max_tokens": -1}, "max_tokens"),
    ({"prompt": [1] * 257, "max_tokens": 0}, None), ({"prompt": [1] * 256}, None),
    ({"prompt": "w1", "messages": HELLO["messages"]}, "messages"), ({"prompt": "w1", "top_p": -.1}, "top_p"),
    ({"prompt": "w1", "top_k": .5}, "top_k"), ({"prompt": "w1", "min_p": 2}, "min_p")], ids=str)
def test_prompts_and_numbers_that_make_no_sense(barn, body, param):
    reply = post(barn, "/completions", **body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


def test_a_prompt_may_fill_the_context_where_nothing_is_written(barn):
    (choice,) = complete(barn, prompt=[5] * 256, echo=True, logprobs=0, max_tokens=0)
    assert len(choice["logprobs"]["tokens"]) == 256


@pytest.mark.parametrize("message", [
    {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}, {"role": "user", "content": None},
    {"role": "tool", "content": "x"}, {"role": "user", "content": "w1", "unknown": 1}])
def test_messages_that_would_be_misread_are_refused(barn, message):
    reply = post(barn, messages=[*HELLO["messages"], message])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")


def test_an_assistant_may_have_said_nothing(barn):
    empty, null, without = (post(barn, messages=[*ASKED, {"role": "assistant", **said}, *ASKED], temperature=0).json()
                            for said in ({"content": ""}, {"content": None}, {"tool_calls": []}))
    assert empty["choices"] == null["choices"] == without["choices"]


def test_variables_reach_the_chat_template(barn, monkeypatch):
    chat, seen = Text.chat, []
    monkeypatch.setattr(Text, "chat", lambda self, said, **variables: seen.append(variables) or chat(
        self, said, **variables))
    assert post(barn, **HELLO, chat_template_kwargs={"enable_thinking": False}).status_code == 200
    assert post(barn, **HELLO, chat_template_kwargs=[]).status_code == 400
    assert seen == [{"enable_thinking": False}]
    monkeypatch.undo()
    assert post(barn, **HELLO, chat_template_kwargs={"messages": []}).status_code == 400


@pytest.mark.parametrize("path, body", [
    ("/completions", {"prompt": "a" * 7_000_000}), ("/completions", {"prompt": ["w1", "w" * 3_000_000]}),
    ("/chat/completions", {"messages": [{"role": "user", "content": "w1 " * 2_000_000}]})])
def test_megabytes_are_refused_before_they_are_tokenised(barn, monkeypatch, path, body):
    seen = []
    monkeypatch.setattr(Text, "plain", lambda self, text: seen.append(text) or [1])
    monkeypatch.setattr(Text, "encode", lambda self, text: seen.append(text) or [1])
    reply = post(barn, path, **body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert sum(map(len, seen)) < 10

