"""The servers of today, as they are documented: what they refuse, how they think, how they count. Each is asked about
200 pairs by each pool: all are labelled, none wrongly, none is asked about more than twice, and the bill is theirs."""
import functools
import json
import re
import threading
from collections import Counter

import pytest
from commands import command, said
from judged import make_pairs, prefer_longer

import annotate
from annotate import POOLS, pool, probe

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
