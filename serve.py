"""Talk to any checkpoint: an OpenAI-compatible server, or one question.

    python serve.py runs/barn/dpo               starts the server, prints a URL
    python serve.py path/to/llama --port 8000   a Hugging Face folder, a PEFT
                                                adapter, or barn
    python serve.py runs/barn/dpo --ask "..."   answers one question and ends
    python serve.py runs/barn/sft --compare runs/barn/dpo --ask "..."
                                                before training and after

The server has one thread, the Writer in rlhf/writer.py, that owns the model
and writes all answers in one batch. HTTP threads read requests and turn tokens
into text. Each answer has its own temperature and random numbers, so that up
to rounding it does not depend on the answers beside it.
Left out: penalties, tools, images, API keys. A request for what is left out is
refused.
"""
import gc
import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data import InputError, loopback, run
from data.choices import speller
from data.flags import Parser
from data.loopback import on_this_machine
from data.protocol import TOP, Refused, check_name, read_request
from rlhf.ask import FORMS, ask, compare
from rlhf.policy import open_checkpoint
from rlhf.sampler import longest_answer, slots_that_fit
from rlhf.update import plainly
from rlhf.writer import ServingEngine, Writer

BODY = 8 << 20                          # the most bytes that a request may have
SLOTS, CONTEXT = 32, 4096               # the most that are used unless --slots or --context is given


def refusal(error):
    """The Refused to send to the client for any exception. An unexpected one is also printed to standard error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, loopback.Unread):
        return Refused(error.status, str(error), "request_too_large" if error.status == 413 else None)
    first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
    print(f"serve.py: {first_line}", file=sys.stderr, flush=True)
    return Refused(500, first_line, None)


class Handler(loopback.Handler):
    """Answers the HTTP requests of one connection."""
    wbufsize = 1 << 16
    begun = False                                       # whether a stream has begun; its connection is then closed
    probed = False                                      # whether check_connection() has sent an interim reply

    def route(self):
        """Answer a request of any kind; an exception becomes an error in OpenAI's form."""
        try:
            body = self.body(BODY)
            if self.server.loopback and self.is_from_elsewhere():
                raise Refused(403, "this server is for programs and pages of its own machine", "forbidden")
            self.answer(unquote(urlsplit(self.path).path).rstrip("/"), body)
        except OSError:                                 # the client has closed the connection
            raise
        except Exception as error:
            refused = refusal(error)
            if self.begun:
                self.event(refused.document)
            else:
                self.reply(refused.status, refused.document)
    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = route

    def answer(self, path, body):
        """Answer a request to one of the paths; Refused for any other."""
        model = self.server
        allowed = {"/v1/chat/completions": "POST", "/v1/completions": "POST", "/v1/models": "GET", "/health": "GET"}
        name = path.removeprefix("/v1/models/")         # it may contain slashes
        if path not in allowed and name == path:
            raise Refused(404, f"there is no {path or '/'} here, only {', '.join(allowed)}", "unknown_url")
        if self.command != allowed.get(path, "GET"):
            raise Refused(405, f"{path} is for {allowed.get(path, 'GET')} requests", "method_not_allowed")
        if path == "/health":
            self.reply(200, {"status": "ok", "slots": model.writer.engine.slots, "writing": len(model.writer.answers),
                             "waiting": len(model.writer.waiting)})
        elif path == "/v1/models":
            self.reply(200, {"object": "list", "data": [self.card(model.names[0])]})
        elif path in allowed:
            self.complete(read_request(body, path == "/v1/chat/completions", model))
        else:
            self.reply(200, self.card(name))

    def card(self, name):
        """What /v1/models says of the model; Refused if `name` is not one of its names."""
        check_name(name, self.server)
        return {"id": name, "object": "model", "created": self.server.since, "owned_by": "local",
                "max_model_len": self.server.context}

    def complete(self, request):
        """Have the writer answer a checked request, and send its answers, in one reply or as a stream."""
        if not self.server.writer.submit(request):
            raise Refused(503, "too many answers are waiting: try again later", "overloaded")
        kind = "chat.completion" if request.chat else "text_completion"
        head = {"id": f"{'chat' * request.chat}cmpl-{secrets.token_hex(12)}", "object": kind,
                "created": int(time.time()), "model": self.server.names[0]}
        try:
            if request.stream:
                self.stream(request, {**head, "object": kind + ".chunk" * request.chat})
            else:
                for _ in self.news(request):            # wait until all answers are finished
                    pass
                choices = [each.choice("message", each.thought, each.content, each.entries, each.finish,
                                       role="assistant") for each in request.answers]
                self.reply(200, {**head, "choices": choices, "usage": usage(request)})
        finally:
            for each in request.answers:                # tells the writer to stop them if the client has gone
                each.dropped = True

    def stream(self, request, head):
        """Send the answers as server-sent events while they are written. head: the fields that all events share."""
        head |= {"usage": None} if request.counts else {}
        for answer, thought, text, entries in self.news(request):
            if not self.begun:
                self.begun = self.close_connection = True
                self.head(200, Content_Type="text/event-stream; charset=utf-8", Cache_Control="no-cache")
                for each in request.answers if request.chat else ():
                    self.event({**head, "choices": [each.choice("delta", "", "", [], None, role="assistant")]})
            if thought or text or entries or answer.finish:
                self.event({**head, "choices": [answer.choice("delta", thought, text, entries, answer.finish)]})
        if request.counts:
            self.event({**head, "choices": [], "usage": usage(request)})
        self.event("[DONE]")

    def news(self, request):
        """Yield (answer, new thought, new text, new log-prob entries) as the writer reports them, until all answers are
        finished.

        Raises ConnectionResetError if the client closes the connection, and the writer's exception if it fails.
        """
        while not all(answer.finish for answer in request.answers):
            self.check_connection()
            try:
                event = request.events.get(timeout=.2)
            except queue.Empty:
                continue
            if isinstance(event, Exception):
                raise event
            answer, *written = event
            if not answer.finish:
                yield answer, *answer.take(*written)

    def check_connection(self):
        """ConnectionResetError if the client has closed the connection.

        A client that has only ended its sending direction still waits for the reply. The two look alike until something
        is sent: a closed connection then becomes an error. Therefore an interim reply is sent, which clients have to
        skip (RFC 9110, section 15.2).
        """
        self.connection.settimeout(0)                   # select() cannot watch more than a thousand connections
        try:
            ended = not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:                         # the connection is open, and there is nothing to read
            ended = False
        finally:
            self.connection.settimeout(self.timeout)
        if not ended:
            return
        if self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise ConnectionResetError
        if not self.begun and not self.probed and self.request_version != "HTTP/1.0":
            self.probed = self.close_connection = True
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()

    def head(self, status, **headers):
        """Send the status line and the headers; Content_Type=... is the header Content-Type."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def event(self, data):
        """Send one server-sent event: a string, or anything else as JSON."""
        self.wfile.write(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def reply(self, status, document):
        """Send a whole reply with a JSON body."""
        data = json.dumps(document).encode()
        self.head(status, Content_Type="application/json", Content_Length=len(data))
        self.wfile.write(data)

    def send_error(self, code, message=None, explain=None):
        """Called by http.server for a request that it cannot parse, or whose method has no do_... function."""
        self.close_connection = True
        self.reply(405 if code == 501 else code, Refused(400, message or "not HTTP", None).document)


def usage(request):
    """OpenAI's token counts: of the prompts, and of all answers to them."""
    prompt, answers = sum(map(len, request.prompts)), sum(answer.count for answer in request.answers)
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


class Server(loopback.Server):
    """The HTTP server; serving() adds what the handlers need of the model: its text, names, limits and writer."""


@contextmanager
def serving(path, host="127.0.0.1", port=0, slots=0, context=0, max_new_tokens=0, name="", device="", dtype="",
            int8=False, graph=True):
    """Serve a checkpoint for the length of a with block; yields the base URL for OpenAI's clients.

    path: see `serve.py --help`, as for the other arguments. port 0 takes any free port; slots, context and
    max_new_tokens 0 take the defaults. InputError if the port is in use or the checkpoint cannot be loaded.
    """
    try:
        server = Server((host, port), Handler)
    except (OSError, UnicodeError) as error:            # the latter for what is no name of a host
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on port {port} of {host:.60}: {why}") from None
    with server:
        policy, cfg, _ = open_checkpoint(path, device, int8, dtype)
        server.text, cfg.max_new_tokens = cfg.text(), max_new_tokens or cfg.max_new_tokens
        server.context = min(context or CONTEXT, policy.gpt.config.max_position_embeddings)
        server.longest, server.longest_chat = cfg.max_new_tokens, longest_answer(server.text, cfg)
        server.since = int(time.time())
        server.names = [name or str(path), str(path), str(path).rstrip("/"), Path(path).name]
        server.spell, server.loopback = speller(server.text.tokenizer), on_this_machine(f"http://{host}")
        longest_token = max(map(len, server.text.tokenizer.get_vocab()))
        server.characters = server.context * (longest_token + 1)        # a space may stand between two tokens
        with policy.gpt.fused(policy.role):
            slots = slots or min(SLOTS, slots_that_fit(policy.gpt, server.context, None))
            server.writer = Writer(ServingEngine(policy.gpt, slots, server.context, server.text.stops, TOP, graph),
                                   Refused(503, "the server is shutting down", None))
            server.writer.start()
            threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
            try:
                yield f"http://{host}:{server.server_port}/v1"
            finally:
                server.shutdown()
                server.writer.close()


# -- the command -------------------------------------------------------------------------------------------------

# Flags that go with --ask only, and with the server only.
ONLY = {"ask": ("compare", "form", "n", "temperature", "seed", "top_p", "top_k", "min_p"),
        "serve": ("host", "port", "slots", "context", "name", "graph", "until_eof")}


def parse(argv):
    parser = Parser("serve.py", __doc__)
    add = parser.add_argument
    add("path", help="a Hugging Face folder or name on the hub (org/name@revision), a PEFT folder, a stage of a run "
        "such as runs/barn/dpo, or barn (the offline world's base model)")
    add("--max_new_tokens", type=int, default=0,
        help="most tokens of an answer; a request can set its own [300, or that of the run]")
    add("--device", default="", help="cpu or cuda [cuda if there is a GPU]")
    add("--dtype", default="", help="float32, bfloat16 or float16 [float32 on a CPU, else bfloat16 or float16]")
    add("--int8", action="store_true", help="keep the linear layers in int8: half the memory, slightly less exact")
    group = parser.add_argument_group("one question")
    add = group.add_argument
    add("--ask", metavar="PROMPT", help="answer this prompt and exit; - reads it from standard input")
    add("--compare", metavar="OTHER", default="", help="print the answers of this checkpoint, too, side by side; with "
        "--ask - each line is a prompt")
    add("--form", choices=FORMS, default="", help="; ".join(f"{form}: {what}" for form, what in FORMS.items())
        + " [chat if there is a chat template, alpaca for models of farm.py without one, else text]")
    add("--n", type=int, default=1, help="number of answers [1]")
    add("--temperature", type=float, default=1., help="of sampling; 0 always takes the likeliest token [1]")
    add("--top_p", type=float, default=1., help="sample from the likeliest tokens with this share of the probability "
        "[1: all]")
    add("--top_k", type=int, default=0, help="sample from so many of the likeliest tokens [0: all]")
    add("--min_p", type=float, default=0., help="sample from the tokens with this share of the probability of the "
        "likeliest one [0: all]")
    add("--seed", type=int, default=0, help="seed of the random numbers [0]")
    group = parser.add_argument_group("the server")
    add = group.add_argument
    add("--host", default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in, without any key [127.0.0.1]")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes any free one [8000]")
    add("--slots", type=int, default=0,
        help=f"answers that are written at the same time [as many as fit, at most {SLOTS}]")
    add("--context", type=int, default=0,
        help=f"most tokens of prompt and answer [the model's limit, at most {CONTEXT}]")
    add("--name", default="", help="name of the model in requests and replies [its path]")
    add("--until_eof", action="store_true", help="end when standard input ends, as it does when the program that has "
        "started the server ends")
    add("--no_graph", dest="graph", action="store_false", help="on a GPU, do not capture decoding steps as CUDA graphs")
    args = parser.parse(argv)
    other = "serve" if args.ask is not None else "ask"
    if stray := [name for name in ONLY[other] if getattr(args, name) != parser.get_default(name)]:
        raise InputError(f"--{stray[0]} would change nothing {'with' if other == 'serve' else 'without'} --ask")
    if min(args.slots, args.context, args.max_new_tokens) < 0 or not 0 <= args.port < 1 << 16:
        raise InputError("--slots, --context and --max_new_tokens must be 0 or more, --port from 0 to 65535")
    if args.n < 1 or not all(0 <= number < 1 << 63 for number in (args.max_new_tokens, args.temperature, args.seed)):
        raise InputError("--n must be 1 or more; --max_new_tokens, --temperature and --seed must be 0 or more")
    if not 0 <= args.top_p <= 1 or not 0 <= args.min_p <= 1 or args.top_k < 0:
        raise InputError("--top_p and --min_p must be from 0 to 1, --top_k 0 or more")
    return args


def end_with_input():
    """End this process when its standard input ends. The system closes that pipe however its writer ends."""
    sys.stdin.buffer.read()
    os._exit(0)


def answer(args):
    """Print the answers that --ask wants."""
    given = {name: value for name, value in vars(args).items() if name not in ("ask", "compare", *ONLY["serve"])}
    prompts = [sys.stdin.read() if args.ask == "-" else args.ask]
    if args.compare:
        prompts = [line for line in prompts[0].splitlines() if line.strip()] if args.ask == "-" else prompts
        if not prompts:
            raise InputError("standard input has no prompt")
        print(compare(other=args.compare, prompts=prompts, **given))
        return
    (answers,) = ask(prompts=prompts, **given)
    for i, said in enumerate(answers, 1):
        print(f"[{i}] " * (args.n > 1) + said)


def main(argv):
    args = parse(argv)
    if args.ask is not None:
        with plainly("try fewer --n, a lower --max_new_tokens, --int8"):
            answer(args)
        return
    if args.until_eof:
        threading.Thread(target=end_with_input, daemon=True).start()
    settings = {name: value for name, value in vars(args).items() if name not in ("ask", "until_eof", *ONLY["ask"])}
    try:
        with plainly("try fewer --slots, a lower --context, --int8"), serving(**settings) as url:
            gc.freeze()                                 # without it, each garbage collection takes a third of a second
            print(f"OPENAI_BASE_URL={url}", flush=True)
            while True:
                time.sleep(60)                          # on Windows, Ctrl-C interrupts a sleep, but not an Event.wait
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "code", 130))


if __name__ == "__main__":
    run(main, "serve.py", "nothing is lost")
