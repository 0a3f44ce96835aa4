"""OpenAI's protocol for serve.py: checks the requests, and turns the tokens of answers into text and `choices`.

Source: OpenAI's API reference, chat completions and completions (platform.openai.com/docs/api-reference).
"""
import json
import queue
import re
import secrets
from functools import cache
from math import inf
from types import SimpleNamespace

import torch
from tokenizers.decoders import ByteLevel

TOP = 20                                # most alternatives to a token in `top_logprobs`
PART = "\ufffd"                         # the decoder's output for a character of which only some bytes are there yet
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Parameters that are not supported, and the values with which they change nothing; other values are refused.
NEUTRAL = {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "echo": False,
           "suffix": "", "tools": [], "functions": [], "response_format": {"type": "text"}}


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


def messages(body):
    """The messages of a request as [{role, content}]; parts of a content are joined to one string. Refused if one of
    them is malformed or not a text."""
    found = []
    for message in typed(body, "messages", list, None) or [None]:
        try:
            parts = message["content"]
            parts = [{"text": parts}] if isinstance(parts, str) else parts
            found.append({"role": ROLES[message["role"]], "content": "".join(part["text"] for part in parts)})
        except (TypeError, LookupError):
            raise Refused(400, f"a message has a role, one of {', '.join(ROLES)}, and a content, a string or parts of "
                          "type text", param="messages") from None
    return found


def tokens(text, body, chat):
    """Token ids of the prompt. Without a chat template, the system messages and the last user message become one
    instruction in AlpacaFarm's prompt format, as in training; earlier turns are dropped."""
    said = messages(body) if chat else typed(body, "prompt", str, "")
    try:
        if not chat:
            return text.plain(said)
        if text.template:
            return text.encode(text.chat(said))
        system = [message["content"] for message in said if message["role"] == "system"]
        user = [message["content"] for message in said if message["role"] == "user"]
        return text.encode(text.render("\n\n".join([*system, *user[-1:]])))
    except Exception as error:                          # half of a surrogate pair, or a template that fails
        raise Refused(400, f"no prompt can be made of this ({type(error).__name__}: {error})") from None


def read_request(body, chat, model):
    """Check the JSON body (bytes) of a request; returns the request in the form that rlhf/writer.py answers.

    The result has the prompt's token ids, the sampling settings, and n answers. u (n, limit) are the uniform random
    numbers with which their tokens are drawn. chat: whether it came to /chat/completions or to /completions. model: the
    serve.Server. Raises Refused if anything is malformed or not supported.
    """
    try:
        body = typed({"body": json.loads(body)}, "body", dict, None)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON", None) from None
    if (name := typed(body, "model", str, model.names[0])) not in model.names:
        raise Refused(404, f"there is no model {name!r} here, only {model.names[0]!r}", "model_not_found", "model")
    for name, neutral in NEUTRAL.items():
        if body.get(name) not in (None, neutral):
            raise Refused(400, f"{name} is not supported here", "unsupported_value", name)
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else typed(body, "stop", list, [])
    if len(stops) > 4 or not all(isinstance(each, str) and each for each in stops):
        raise Refused(400, "stop is a string, or a list of up to four", param="stop")
    top = number(body, "top_logprobs" if chat else "logprobs", None, 0, TOP)
    logprobs = typed(body, "logprobs", bool, False) if chat else top is not None
    prompt = tokens(model.text, body, chat)
    room = model.context - len(prompt)
    if room < 1 or not prompt:
        raise Refused(400, f"the prompt has {len(prompt)} tokens; it needs one, and room for an answer in a context "
                      f"length of {model.context}", "context_length_exceeded" if prompt else "invalid_value")
    longest = number(body, "max_tokens", number(body, "max_completion_tokens", model.longest, 1, inf), 1, inf)
    seed = number(body, "seed", None, -1 << 63, (1 << 63) - 1)
    dice = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
    stream = typed(body, "stream", bool, False)
    request = SimpleNamespace(
        chat=chat, prompt=prompt, temperature=number(body, "temperature", 1, 0, 2, float), stops=stops,
        u=torch.rand(number(body, "n", 1, 1, 128), min(longest, room), generator=dice),  # drawn as in sampler.sample
        logprobs=logprobs, top=top or 0, live=stream or bool(stops), stream=stream,
        counts=typed(typed(body, "stream_options", dict, {}), "include_usage", bool, False), events=queue.Queue())
    request.answers = [Answer(request, i, model) for i in range(len(request.u))]
    return request


class Answer:
    """One answer of a request: its tokens, its text, and how much of the text the client has got.

    The text may end in a part of a character, in a part of a stop string, or, in a chat, in whitespace that may turn
    out to be the end of the answer. Such an end is held back until more tokens arrive. `sent` is the length of the text
    that was not held back, `content` the text that was sent.
    """

    def __init__(self, request, index, model):
        self.request, self.index, self.text, self.spell = request, index, model.text, model.spell
        self.told, self.dropped, self.finish, self.count = 0, False, None, 0
        # A completion is decoded together with the end of its prompt, as some tokenizers drop the space before the
        # first word of a text. `before` and `begin` are how many characters and tokens belong to the prompt.
        self.ids = [] if request.chat else request.prompt[-8:]
        self.before, self.begin = 0, len(self.ids)
        self.before = len(self.decode(self.begin).rstrip(PART))
        self.sent, self.content, self.entries = 0, "", []

    def decode(self, end):
        """The text of the answer after its first tokens: of ids[:end], without the part that belongs to the prompt."""
        return self.text.tokenizer.decode(self.ids[:end], skip_special_tokens=True)[self.before:]

    def take(self, ids, logps, ended):
        """Add new tokens to the answer; returns (new text for the client, new log-prob entries).

        ids: the new token ids. logps: for each of them its log-prob and the best alternatives, as in entry().
        ended: whether the writer has finished this answer.
        """
        eos, stops = bool(ended and ids[-1] in self.text.stops), self.request.stops
        old = len(self.ids)
        self.ids += ids[:-1] if eos else ids
        raw = self.decode(len(self.ids))
        if any(stop in raw for stop in stops):          # drop all tokens behind the one that completed a stop string
            end = next(i for i in range(old + 1, len(self.ids) + 1) if any(stop in self.decode(i) for stop in stops))
            del self.ids[end:]
            raw = self.decode(end)
            raw = raw[:min(raw.find(stop) for stop in stops if stop in raw)]
            self.finish, self.dropped, eos = "stop", True, False
        elif ended:
            self.finish = "stop" if eos else "length"
        self.count = len(self.ids) - self.begin + eos
        entries = [self.entry(id, logp) for id, logp in zip(self.ids[old:], logps)]
        self.entries += entries
        return self.unsent(raw), entries

    def unsent(self, raw):
        """The part of the text `raw` that has not been sent yet and that later tokens cannot change."""
        end = len(raw)
        if not self.finish:
            end = len(raw.rstrip(PART))
            begun = [k for stop in self.request.stops for k in range(1, len(stop)) if raw.endswith(stop[:k], 0, end)]
            end -= max(begun, default=0)
        if self.request.chat:                           # chat answers have no whitespace around them, as in Text.decode
            end = len(raw[:end].rstrip())
        text = raw[self.sent:end] if self.content or not self.request.chat else raw[:end].lstrip()
        self.sent, self.content = end, self.content + text
        return text

    def entry(self, id, logps):
        """A token's log-prob and its alternatives in OpenAI's form.

        logps: (its log-prob, ids of the likeliest tokens, their log-probs), as ServingEngine.read() gives them.
        """
        logp, *best = logps
        tokens = [(id, logp), *zip(*best)][:1 + self.request.top]
        entries = []
        for id, logp in tokens:
            data = self.spell(id)
            entries.append({"token": data.decode(errors="backslashreplace"), "logprob": max(logp, -9999.),
                            "bytes": list(data)})
        return {**entries[0], "top_logprobs": entries[1:]}

    def choice(self, kind, text, entries, finish, **role):
        """An entry of `choices` in OpenAI's form. kind: "message" for a whole answer, "delta" for a piece of a stream.
        role: role="assistant", for chats where OpenAI sends it."""
        if self.request.chat:
            said, logprobs = {kind: {**role, "content": text}}, {"content": entries, "refusal": None}
        else:
            best = [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in entries]
            said, logprobs = {"text": text}, {"tokens": [each["token"] for each in entries], "top_logprobs": best,
                                              "token_logprobs": [each["logprob"] for each in entries]}
        return {"index": self.index, **said, "logprobs": logprobs if self.request.logprobs else None,
                "finish_reason": finish}


def speller(tokenizer):
    """A function that returns the bytes of a token id. Text.decode() cannot do it for parts of characters.

    Tokenizers write bytes in one of two ways: GPT-2's alphabet, which has a printable character for each byte, or, for
    single bytes, <0xE2> as SentencePiece does.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]       # bytes whose character is printable as it is
    printed = {chr(byte): byte for byte in plain}
    printed |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*plain}))}

    @cache
    def spell(id):
        piece = tokenizer.id_to_token(id) or ""
        if isinstance(tokenizer.decoder, ByteLevel) and printed.keys() >= set(piece):
            return bytes(printed[character] for character in piece)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()                    # SentencePiece's space
    return spell
