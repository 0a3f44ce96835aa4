"""OpenAI's protocol for serve.py: what a request may ask for, and what is refused.

Source: OpenAI's API reference, chat completions and completions (platform.openai.com/docs/api-reference); top_k, min_p
and chat_template_kwargs are named as in vLLM.
"""
import json
import queue
import secrets
from math import inf
from types import SimpleNamespace

import torch

from data import did_you_mean
from data.choices import PART, Answer

TOP = 20                                # most alternatives to a token in `top_logprobs`
ANSWERS = 1024                          # most answers to one request, with all its prompts
STOPS = 16                              # most stop strings; OpenAI takes four
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Parameters that are supported in requests of both kinds, in chats, and in completions.
SUPPORTED = {"model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stream",
             "stream_options", "logprobs"}
IN_CHATS = SUPPORTED | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
IN_COMPLETIONS = SUPPORTED | {"prompt", "echo"}
# Parameters for accounts, caches and bills. They are ignored, since they do not change the answers.
BOOKKEEPING = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
               "prompt_cache_retention"}
# Values with which an unsupported parameter asks for nothing. So do null and empty values of any parameter.
NEUTRAL = {"frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
           "response_format": ({"type": "text"},), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
           "parallel_tool_calls": (True, False), "modalities": (["text"],), "reasoning_effort": ("none",),
           "verbosity": ("medium",), "best_of": (1,), "echo": (False,), "min_tokens": (0,), "ignore_eos": (False,),
           "use_beam_search": (False,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
           "include_stop_str_in_output": (False,), "add_generation_prompt": (True,),
           "continue_final_message": (False,)}
# Keys that a message may have. The speaker's name and the thought before an earlier answer are ignored.
IN_MESSAGES = {"role", "content", "name", "reasoning", "reasoning_content"}


class Refused(Exception):
    """A request is refused. `status` is the HTTP status, `document` the JSON body, in the form of OpenAI's errors."""

    def __init__(self, status, message, code="invalid_value", param=None):
        self.status, kind = status, "invalid_request_error" if status < 500 else "server_error"
        self.document = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def number(body, name, default, least, most, kind=int):
    """The number body[name], or the default if it is absent or null; Refused unless it is from `least` to `most`."""
    value = default if body.get(name) is None else body[name]
    if value is not default and (type(value) not in (int, kind) or not least <= value <= most):
        raise Refused(400, f"{name} is a {'whole ' if kind is int else ''}number from {least} to {most}", param=name)
    return value


def typed(body, name, kind, default):
    """body[name], or the default if it is absent or null; Refused unless its type is `kind`."""
    value = default if body.get(name) is None else body[name]
    if type(value) is not kind:
        raise Refused(400, f"{name} has to be a {kind.__name__}", "invalid_type", name)
    return value


def check_name(name, model):
    """Refused unless the model that is served has this name."""
    if name not in model.names:
        raise Refused(404, f"there is no model {name!r} here, only {model.names[0]!r}", "model_not_found", "model")


def refuse_the_rest(body, supported, param=None):
    """Refused if anything is asked for that is not `supported`. Only what changes no answer is ignored."""
    for name, value in body.items():
        nothing = (None, "", [], {}, *NEUTRAL.get(name, ()))
        if name not in supported | BOOKKEEPING and value not in nothing:
            raise Refused(400, f"{name} is not supported here{did_you_mean(name, supported)}", "unsupported_value",
                          param or name)


# -- prompts -----------------------------------------------------------------------------------------------------

def messages(body):
    """The messages of a request as [{role, content}]; the parts of a content are joined into one string. An assistant's
    content may be null. Refused if a message is malformed, not a text, or calls tools."""
    found = []
    for message in typed(body, "messages", list, None) or [None]:
        try:
            role, parts = ROLES[message["role"]], message.get("content")
            parts = "" if parts is None and role == "assistant" else parts
            parts = [{"text": parts}] if isinstance(parts, str) else parts
            found.append({"role": role, "content": "".join(part["text"] for part in parts)})
        except (TypeError, LookupError, AttributeError):
            raise Refused(400, f"a message has a role, one of {', '.join(ROLES)}, and a content, a string or parts of "
                          "type text", param="messages") from None
        refuse_the_rest(message, IN_MESSAGES, "messages")
    return found


def conversation(body, model):
    """The Prompt of a chat. Without a chat template, the system messages and the last user message become
    one instruction in AlpacaFarm's prompt format, as in training; earlier turns are dropped."""
    said, text = messages(body), model.text
    variables = typed(body, "chat_template_kwargs", dict, {})
    check_characters(sum(len(message["content"]) for message in said), model)
    if text.template:
        return text.chat(said, **variables)
    if variables:
        raise Refused(400, "this model has no chat template, and so no variables", param="chat_template_kwargs")
    system = [message["content"] for message in said if message["role"] == "system"]
    user = [message["content"] for message in said if message["role"] == "user"]
    return text.render("\n\n".join([*system, *user[-1:]]))


def check_characters(count, model):
    """Refused if a prompt of so many characters is certainly too long: tokenising megabytes takes seconds."""
    if count > model.characters:
        raise Refused(400, f"the prompt has {count} characters; a context length of {model.context} tokens has room "
                      f"for {model.characters} at most", "context_length_exceeded")


def completion_prompts(body, model):
    """[(token ids, text)] of the prompts of a completion: one prompt or a list, of texts or of lists of token ids."""
    given = "" if body.get("prompt") is None else body["prompt"]
    several = isinstance(given, list) and given and not isinstance(given[0], int)
    found = []
    for prompt in given if several else [given]:
        if isinstance(prompt, str):
            check_characters(len(prompt), model)
            found.append((model.text.plain(prompt), prompt))
        elif isinstance(prompt, list):
            ids = model.text.checked(prompt)
            found.append((ids, model.text.tokenizer.decode(ids, skip_special_tokens=False).rstrip(PART)))
        else:
            raise Refused(400, "prompt is a string, a list of strings, a list of token ids or a list of such lists",
                          "invalid_type", "prompt")
    return found


def prompts(body, chat, model):
    """[(token ids, text)] of the prompts of a request; a chat has one."""
    try:
        if chat:
            prompt = conversation(body, model)
            found = [(model.text.encode(prompt), prompt)]
        else:
            found = completion_prompts(body, model)
    except Refused:
        raise
    except Exception as error:                          # half of a surrogate pair, or a template that fails
        raise Refused(400, f"no prompt can be made of this ({type(error).__name__}: {error})") from None
    for ids, _ in found:
        room = 0 if not chat and body.get("max_tokens") == 0 else 1
        if len(ids) + room > model.context or not ids:
            raise Refused(400, f"the prompt has {len(ids)} tokens; it needs one, and room for an answer in a context "
                          f"length of {model.context}", "context_length_exceeded" if ids else "invalid_value")
    return found


# -- requests ----------------------------------------------------------------------------------------------------

def read_request(body, chat, model):
    """Check the JSON body (bytes) of a request; returns the request in the form that rlhf/writer.py answers.

    The result has the sampling settings, and n answers to each prompt. The tokens of an answer are drawn with its
    uniform random numbers, u (limit,). chat: whether the request came to /chat/completions or to /completions. model:
    the serve.Server. Raises Refused if anything is malformed or not supported.
    """
    try:
        body = typed({"body": json.loads(body)}, "body", dict, None)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON", None) from None
    check_name(typed(body, "model", str, model.names[0]), model)
    refuse_the_rest(body, IN_CHATS if chat else IN_COMPLETIONS)
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else typed(body, "stop", list, [])
    if len(stops) > STOPS or not all(isinstance(each, str) and each for each in stops):
        raise Refused(400, f"stop is a string, or a list of up to {STOPS}", param="stop")
    top = number(body, "top_logprobs" if chat else "logprobs", None, 0, TOP)
    logprobs = typed(body, "logprobs", bool, False) if chat else top is not None
    stream, how = typed(body, "stream", bool, False), sampling(body)
    request = SimpleNamespace(
        chat=chat, how=how, sorts=how[1:] != (1, 0, 0), stops=stops, logprobs=logprobs, top=top or 0, stream=stream,
        echo=not chat and typed(body, "echo", bool, False), live=stream or bool(stops),
        counts=typed(typed(body, "stream_options", dict, {}), "include_usage", bool, False), events=queue.Queue())
    add_answers(request, body, model)
    return request


def sampling(body):
    """(temperature, top_p, top_k, min_p) of a request; vLLM's top_k -1 is 0, all tokens."""
    return (number(body, "temperature", 1, 0, 2, float), number(body, "top_p", 1, 0, 1, float),
            max(0, number(body, "top_k", 0, -1, 1 << 24)), number(body, "min_p", 0, 0, 1, float))


def add_answers(request, body, model):
    """Give the request its prompts, and n answers to each. The random numbers for a prompt are drawn as sampler.sample
    draws them, and do not depend on the other prompts."""
    least = 1 if request.chat else 0
    usual = model.longest_chat if request.chat else model.longest
    longest = number(body, "max_completion_tokens", usual, least, inf)
    longest, n = number(body, "max_tokens", longest, least, inf), number(body, "n", 1, 1, 128)
    seed = number(body, "seed", None, -1 << 63, (1 << 63) - 1)
    found = prompts(body, request.chat, model)
    if len(found) * n > ANSWERS:
        raise Refused(400, f"{len(found)} prompts with {n} answers each; {ANSWERS} answers at most", param="prompt")
    request.prompts, request.answers = [ids for ids, _ in found], []
    for ids, text in found:
        dice = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        for u in torch.rand(n, min(longest, model.context - len(ids)), generator=dice):
            request.answers.append(Answer(request, len(request.answers), ids, u, model, text))
