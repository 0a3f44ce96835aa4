"""An OpenAI-compatible server for any checkpoint: a judge on your own GPU, a way to talk to what you have trained.

    python serve.py runs/barn/dpo                     prints the URL that OPENAI_BASE_URL wants
    python serve.py path/to/llama --port 8000         a Hugging Face folder, a PEFT adapter, or barn

One thread, the Writer in rlhf/rollout.py, owns the model and writes all answers together; the threads of HTTP read
requests and turn tokens into text. Each answer has its own temperature and random numbers, so but for rounding it does
not depend on those beside it. Left out: top-p and penalties (refused, not ignored), tools, images, keys.
"""
import argparse
import gc
import json
import queue
import re
import secrets
import select
import socket
import sys
import threading
import time
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import torch
from tokenizers.decoders import ByteLevel

from data import InputError, run, underscored
from data.text import Text, chat_template, read_json
from data.weights import assign, load_adapter
from rlhf.config import BASE, Config
from rlhf.policy import Policy, load_base
from rlhf.rollout import Standing, Writer, fitting

BODY = 8 << 20                          # bytes of a request
SLOTS, CONTEXT = 32, 4096               # at most, where the flags do not say
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


def refusal(error):
    """What a client learns of any exception; one that nobody foresaw is a line on the console, too."""
    if isinstance(error, Refused):
        return error
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    print(f"serve.py: {said}", file=sys.stderr, flush=True)
    return Refused(500, said, None)


def load(path, device="", int8=False):
    """(policy, text, longest answer) of a Hugging Face folder, a PEFT folder, a stage of a run, or `barn`."""
    folder = BASE if path == "barn" else Path(path)
    settings = read_json(folder / "config.json")
    settings = settings if {"id", "needs"} <= settings.keys() else {}                # a stage writes those
    if settings:
        folder = folder / "checkpoint"
    elif stages := sorted(each.parent.name for each in folder.glob("*/checkpoint")):
        raise InputError(f"{path} is a whole run: choose a stage, as in {folder / stages[0]}")
    if (folder / "head.safetensors").exists():
        raise InputError(f"{path} is a reward model, which scores texts and writes none")
    base, adapter = folder, (folder / "adapter_config.json").exists()
    if adapter:
        tensors, adapted = load_adapter(folder)
        base = settings.get("model") or adapted.get("base_model_name_or_path")
    cfg = Config(model=str(base), device=device, int8=int8)
    policy, text = Policy(load_base(cfg)), Text(cfg.checkpoint)
    if adapter:
        policy.role = "served"
        policy.gpt.add_role(policy.role, adapted["r"], adapted["lora_alpha"])
        assign(policy.gpt.adapter(policy.role), tensors, str(folder))
        policy.gpt.requires_grad_(False)
    return policy, text, settings.get("max_new_tokens", Config.max_new_tokens)


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
        if not chat:                                    # no template has written special tokens there
            return text.tokenizer.encode(said).ids if text.template else text.encode(said)
        if text.template:
            return text.encode(chat_template(text.template)(
                messages=said, add_generation_prompt=True, bos_token=text.bos_token or "",
                eos_token=text.special("eos_token") or ""))
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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"                       # keep the connection
    disable_nagle_algorithm = True                      # a reply is small: do not wait 40 ms for more of it
    wbufsize = 1 << 16
    timeout = 60                                        # seconds that a client may be silent, or deaf

    begun = False                                       # has the stream, which ends with its connection?

    def route(self):
        try:
            self.answer(urlsplit(self.path).path.rstrip("/"))
        except OSError:                                 # the client is gone
            raise
        except Exception as error:
            refused = refusal(error)
            self.event(refused.document) if self.begun else self.reply(refused.status, refused.document)
    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = route

    def answer(self, path):
        model, body = self.server, self.body()
        allowed = {"/v1/chat/completions": "POST", "/v1/completions": "POST", "/v1/models": "GET", "/health": "GET"}
        if path not in allowed:
            raise Refused(404, f"there is no {path or '/'} here, only {', '.join(allowed)}", "unknown_url")
        if self.command != allowed[path]:
            raise Refused(405, f"{path} wants {allowed[path]}", "method_not_allowed")
        if path == "/health":
            self.reply(200, {"status": "ok", "slots": model.writer.engine.slots, "writing": len(model.writer.answers),
                             "waiting": len(model.writer.waiting)})
        elif path == "/v1/models":
            one = {"id": model.names[0], "object": "model", "created": model.since, "owned_by": "local"}
            self.reply(200, {"object": "list", "data": [one]})
        else:
            self.complete(read_request(body, path == "/v1/chat/completions", model))

    def body(self):
        """The bytes of the request; of too many a part is read, as who is still sending reads no reply."""
        length = self.headers.get("Content-Length", "0")
        known = re.fullmatch(r"\d{1,15}", length) and "Transfer-Encoding" not in self.headers
        data = self.rfile.read(min(int(length), 4 * BODY)) if known else b""
        if known and len(data) <= BODY:
            return data
        self.close_connection = True
        raise Refused(413, f"the body is longer than {BODY} bytes", "request_too_large") if known else (
            Refused(411, "Content-Length has to say how long the body is", None))

    def complete(self, request):
        if not self.server.writer.submit(request):
            raise Refused(503, "too many answers are waiting: try again later", "overloaded")
        kind = "chat.completion" if request.chat else "text_completion"
        head = {"id": f"{'chat' * request.chat}cmpl-{secrets.token_hex(12)}", "object": kind,
                "created": int(time.time()), "model": self.server.names[0]}
        try:
            if request.stream:
                self.stream(request, {**head, "object": kind + ".chunk" * request.chat})
            else:
                list(self.news(request))                # to the end
                choices = [each.choice("message", each.content, each.explained, each.finish, role="assistant")
                           for each in request.answers]
                self.reply(200, {**head, "choices": choices, "usage": usage(request)})
        finally:
            for each in request.answers:                # nobody listens any more
                each.dropped = True

    def stream(self, request, head):
        head |= {"usage": None} if request.counts else {}
        for answer, text, entries in self.news(request):
            if not self.begun:
                self.begun = self.close_connection = True
                self.head(200, Content_Type="text/event-stream; charset=utf-8", Cache_Control="no-cache")
                for each in request.answers if request.chat else ():
                    self.event({**head, "choices": [each.choice("delta", "", [], None, role="assistant")]})
            if text or entries or answer.finish:
                self.event({**head, "choices": [answer.choice("delta", text, entries, answer.finish)]})
        if request.counts:
            self.event({**head, "choices": [], "usage": usage(request)})
        self.event("[DONE]")

    def news(self, request):
        """(answer, its new text, its new log-probs) as they come, until all answers are finished."""
        while not all(answer.finish for answer in request.answers):
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError              # the client has hung up
            try:
                event = request.events.get(timeout=.2)
            except queue.Empty:
                continue
            if isinstance(event, Exception):
                raise event
            answer, *written = event
            if not answer.finish:
                yield answer, *answer.take(*written)

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def event(self, data):
        self.wfile.write(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def reply(self, status, document):
        data = json.dumps(document).encode()
        self.head(status, Content_Type="application/json", Content_Length=len(data))
        self.wfile.write(data)

    def send_error(self, code, message=None, explain=None):
        """What the library says of a request that it cannot read."""
        self.close_connection = True
        self.reply(405 if code == 501 else code, Refused(400, message or "not HTTP", None).document)

    def log_message(self, *args):
        pass


def usage(request):
    asked, said = len(request.prompt), sum(answer.count for answer in request.answers)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


class Server(ThreadingHTTPServer):
    """The server, and what its threads know of the model."""
    request_queue_size = 128                            # callers that ring at the same moment

    def handle_error(self, request, client_address):
        """A client that is gone is no news."""


@contextmanager
def serving(path, host="127.0.0.1", port=0, slots=0, context=0, max_new_tokens=0, name="", device="", int8=False,
            graph=True):
    """Serve a checkpoint for the length of a with block; yields the base URL. port 0: any that is free."""
    try:
        server = Server((host, port), Handler)
    except OSError as error:
        raise InputError(f"cannot listen on port {port} of {host}: {error.strerror}") from None
    with server:
        policy, server.text, longest = load(path, device, int8)
        server.context = min(context or CONTEXT, policy.gpt.config.max_position_embeddings)
        server.longest, server.since = max_new_tokens or longest, int(time.time())
        server.names, server.spell = [name or str(path), str(path), Path(path).name], speller(server.text.tokenizer)
        with policy.gpt.settled(policy.role):
            slots = slots or min(SLOTS, fitting(policy.gpt, server.context))
            server.writer = Writer(Standing(policy.gpt, slots, server.context, server.text.stops, TOP, graph),
                                   Refused(503, "the server is shutting down", None))
            server.writer.start()
            threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
            try:
                yield f"http://{host}:{server.server_port}/v1"
            finally:
                server.shutdown()
                server.writer.close()


def parse(argv):
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", help="a Hugging Face folder, a PEFT folder, a stage of a run as in runs/barn/dpo, or barn")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; there are no keys [127.0.0.1]")
    add("--port", type=int, default=8000, help="0: any that is free [8000]")
    add("--slots", type=int, default=0, help=f"answers that are written at a time [as many as fit, at most {SLOTS}]")
    add("--context", type=int, default=0, help=f"tokens of prompt and answer [what the model knows, at most {CONTEXT}]")
    add("--max_new_tokens", type=int, default=0, help="longest answer if a request does not say [300; a run's own]")
    add("--name", default="", help="what the model is called [its path]")
    add("--device", default="", help="cpu or cuda [cuda where there is one]")
    add("--int8", action="store_true", help="keep the linear layers in int8: half the memory, a little rounding")
    add("--no_graph", dest="graph", action="store_false", help="on a GPU, do without captured decoding steps")
    args = parser.parse_args(underscored(argv))
    if min(args.slots, args.context, args.max_new_tokens) < 0 or not 0 <= args.port < 1 << 16:
        raise InputError("--slots, --context and --max_new_tokens are not negative, --port is at most 65535")
    return args


def main(argv):
    args = parse(argv)
    try:
        with serving(**vars(args)) as url:
            gc.freeze()                                 # or each search for garbage halts all for a third of a second
            print(f"OPENAI_BASE_URL={url}", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:        # on CPUs, torch has no exception of its own for it
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        print("serve.py: out of memory; try fewer --slots, a lower --context, --int8", file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    run(main, "serve.py", "nothing is lost")
