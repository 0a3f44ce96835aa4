"""OpenAI's protocol: what a request asks for, checked, and how the tokens of its answers become text and choices."""
import json
import queue
import re
import secrets
from functools import cache
from math import inf
from types import SimpleNamespace

import torch
from tokenizers.decoders import ByteLevel

TOP = 20                                # alternatives to a token
PART = "\ufffd"                         # what a character is decoded to while bytes of it are missing
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NEUTRAL = {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "echo": False,
           "suffix": "", "tools": [], "functions": [], "response_format": {"type": "text"}}


class Refused(Exception):
    """A request that is not answered, as OpenAI says it."""

    def __init__(self, status, message, code="invalid_value", param=None):
        self.status, kind = status, "invalid_request_error" if status < 500 else "server_error"
        self.document = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def number(body, name, default, least, most, kind=int):
    value = default if body.get(name) is None else body[name]
    if value is not default and (type(value) not in (int, kind) or not least <= value <= most):
        raise Refused(400, f"{name} is a {'whole ' if kind is int else ''}number from {least} to {most}", param=name)
    return value


def typed(body, name, kind, default):
    value = default if body.get(name) is None else body[name]
    if type(value) is not kind:
        raise Refused(400, f"{name} has to be a {kind.__name__}", "invalid_type", name)
    return value


def messages(body):
    """[{role, content}] with contents that are strings."""
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
    """The ids of the prompt: by the checkpoint's template, or the last question in the form of training."""
    said = messages(body) if chat else typed(body, "prompt", str, "")
    try:
        if not chat:
            return text.plain(said)
        if text.template:
            return text.encode(text.chat(said))
        told, asked = ([each["content"] for each in said if each["role"] == role] for role in ("system", "user"))
        return text.encode(text.render("\n\n".join([*told, *asked[-1:]])))
    except Exception as error:                          # half a surrogate; or a template, which may fail in any way
        raise Refused(400, f"this makes no prompt ({type(error).__name__}: {error})") from None


def read_request(body, chat, model):
    """What a body asks for, checked, with all that a Writer wants to know of a request."""
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
        u=torch.rand(number(body, "n", 1, 1, 128), min(longest, room), generator=dice),  # as rollout.sample draws them
        logprobs=logprobs, top=top or 0, live=stream or bool(stops), stream=stream,
        counts=typed(typed(body, "stream_options", dict, {}), "include_usage", bool, False), events=queue.Queue())
    request.answers = [Answer(request, i, model) for i in range(len(request.u))]
    return request


class Answer:
    """One answer: what the writer has to know of it, and its tokens as they become text.

    `sent` is how much of its text has been handed out: what may yet turn out to be part of a character or of a stop
    string, or whitespace at the end of a chat answer, is held back.
    """

    def __init__(self, request, index, model):
        self.request, self.index, self.text, self.spell = request, index, model.text, model.spell
        self.told, self.dropped, self.finish, self.count = 0, False, None, 0
        # text goes on behind the prompt's end, as some tokenizers drop the space before a text's first word
        self.ids = [] if request.chat else request.prompt[-8:]
        self.before, self.begin = 0, len(self.ids)
        self.before = len(self.decode(self.begin).rstrip(PART))
        self.sent, self.content, self.explained = 0, "", []

    def decode(self, end):
        return self.text.tokenizer.decode(self.ids[:end], skip_special_tokens=True)[self.before:]

    def take(self, ids, explained, ended):
        """Read what was written since -> (text, its tokens' log-probs) to hand out."""
        eos, stops = bool(ended and ids[-1] in self.text.stops), self.request.stops
        old = len(self.ids)
        self.ids += ids[:-1] if eos else ids
        raw = self.decode(len(self.ids))
        if any(stop in raw for stop in stops):          # back to the first token with which there was one
            end = next(i for i in range(old + 1, len(self.ids) + 1) if any(stop in self.decode(i) for stop in stops))
            del self.ids[end:]
            raw = self.decode(end)
            raw = raw[:min(raw.find(stop) for stop in stops if stop in raw)]
            self.finish, self.dropped, eos = "stop", True, False
        elif ended:
            self.finish = "stop" if eos else "length"
        self.count = len(self.ids) - self.begin + eos
        entries = [self.entry(*each) for each in zip(self.ids[old:], explained)]
        self.explained += entries
        return self.certain(raw), entries

    def certain(self, raw):
        """What of the text can be handed out now."""
        end = len(raw)
        if not self.finish:
            end = len(raw.rstrip(PART))
            end -= max((k for stop in self.request.stops for k in range(1, len(stop))
                        if raw.endswith(stop[:k], 0, end)), default=0)
        if self.request.chat:                           # no whitespace around it: so does Text.decode()
            end = len(raw[:end].rstrip())
        text = raw[self.sent:end] if self.content or not self.request.chat else raw[:end].lstrip()
        self.sent, self.content = end, self.content + text
        return text

    def entry(self, id, explained):
        """A token and its alternatives in OpenAI's form."""
        logp, *best = explained
        said = [(self.spell(id), logp) for id, logp in [(id, logp), *zip(*best)][:1 + self.request.top]]
        said = [{"token": data.decode(errors="backslashreplace"), "logprob": max(logp, -9999.), "bytes": list(data)}
                for data, logp in said]
        return {**said[0], "top_logprobs": said[1:]}

    def choice(self, kind, text, entries, finish, **role):
        """One of `choices`; kind: a whole "message", or a "delta"."""
        if self.request.chat:
            said, logprobs = {kind: {**role, "content": text}}, {"content": entries, "refusal": None}
        else:
            best = [{one["token"]: one["logprob"] for one in each["top_logprobs"]} for each in entries]
            said, logprobs = {"text": text}, {"tokens": [each["token"] for each in entries], "top_logprobs": best,
                                              "token_logprobs": [each["logprob"] for each in entries]}
        return {"index": self.index, **said, "logprobs": logprobs if self.request.logprobs else None,
                "finish_reason": finish}


def speller(tokenizer):
    """A function from a token's id to its bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]       # GPT-2's alphabet for bytes
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
