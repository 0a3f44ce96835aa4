"""The chat template of an instruct checkpoint: a program that comes with a download, rendered without trusting it.

It is rendered as transformers renders it, to the byte. The sandbox that both use keeps a template away from Python and
from files, but not from all memory and time: one line can ask for a string of 3 GB. So a template is first tried out on
a few chats by a child process with limits, once in the life of a process, and rendered here only if it keeps to them.
What remains: one that turns greedy on some other chat can cost time and memory, never more.
"""
import json
import re
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from data import InputError

LONGEST = 1 << 16                       # characters of a template; usual ones have a few thousand
OUTPUT = 1_000_000                      # characters that a template may add to what was said
SECONDS, MEMORY = 10, 1 << 30           # what the child may take; for usual templates it needs 0.1 s
SMALL = 1 << 31                         # the largest factor of a product: no number grows without end

USER, SYSTEM, ASSISTANT = ({"role": role, "content": content} for role, content in (
    ("user", "List two trees."), ("system", "Be brief."), ("assistant", "Oak and ash.")))
ODD = {"role": "user", "content": " {{ 7 * 7 }} {% raw %} <|end|> \\ \" <b>&amp;</b> \0 é😀\r\n\n "}
PROBES = [USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [ODD]
CHILD = "import sys; sys.path = sys.argv[1:]; from data.template import rehearse; rehearse()"


@lru_cache(None)
def renderer(template):
    """render(messages, **values) -> the text of a chat up to where the answer begins; InputError if it fails."""
    from importlib.metadata import version
    if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < (3, 1, 6):
        raise InputError(f"a chat template needs jinja2 3.1.6 or later, and here is {version('jinja2')}, from whose "
                         "sandbox there are known ways out: pip install -U jinja2")
    if len(template) > LONGEST:
        raise InputError(f"the chat template has {len(template)} characters, more than {LONGEST}")
    if complaint := trial(template):
        raise InputError(f"the chat template fails: {complaint}")
    program = environment().from_string(template)

    def render(messages, **values):
        try:
            return written(program, messages, values)
        except Exception as error:                      # it is a program: it can fail in any way
            raise InputError(f"the chat template fails: {brief(str(error) or type(error).__name__)}") from None
    return render


def written(program, messages, values):
    """What a program writes, no longer than it may; `values` are as in transformers, tools that there are not too."""
    pieces, room = [], OUTPUT + sum(len(str(message)) for message in messages)
    values = {"tools": None, "documents": None, "add_generation_prompt": True, **values}
    for piece in program.generate(messages=messages, **values):
        room -= len(piece)
        if room < 0:
            raise MemoryError(f"it adds more than {OUTPUT} characters to a chat")
        pieces.append(piece)
    return "".join(pieces)


def brief(message):
    """A message as a line that a terminal can show: the words may be the template's own."""
    return " ".join("".join(c if c.isprintable() else " " for c in message[:300]).split())


def environment():
    """The sandbox of templates with all that transformers offers them; products are of small numbers only."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])     # these are not computed while compiling either

        def call_binop(self, context, operator, left, right):
            if operator == "**" or not all(isinstance(x, (int, float)) and abs(x) <= SMALL for x in (left, right)):
                raise SecurityError("* is for small numbers only, and ** for none")
            return left * right

    class Generation(Extension):
        """{% generation %} marks what is to be learned from, in templates made for training; here, a plain block."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Notes(Namespace):
        """A namespace without private names: with those it could pass for something else."""

        def __init__(self, /, *args, **names):
            super().__init__()
            for name, value in dict(*args, **names).items():
                self[name] = value

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    class Dict:
        """dict, but not the type itself: dict.update(message, ...) would get past the sandbox."""
        fromkeys = staticmethod(dict.fromkeys)

        def __call__(self, *args, **names):
            return dict(*args, **names)

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(format):
        return datetime.now().strftime(format)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = tojson                  # jinja's own writes < as \u003c
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Notes)
    return sandbox


# ---- the trial -----------------------------------------------------------------------------------------

@lru_cache(None)
def trial(template):
    """What speaks against rendering a template, in a sentence; nothing if a child process could with its limits."""
    job = json.dumps([template, SECONDS, MEMORY])
    try:
        child = subprocess.run(                         # -I and -S: nothing runs there that was not asked for
            [sys.executable, "-IS", "-X", "utf8", "-c", CHILD, str(Path(__file__).parents[1]), *sys.path], input=job,
            capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"it needs more than {SECONDS} seconds for a short chat"
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2]
        return f"it ends the process that tries it out, exit code {child.returncode} {brief(last)}".rstrip()
    return child.stdout.strip()


def rehearse():
    """In the child: renders the probe chats, and prints what no template may do. Refusing a chat is not that:
    some know no system role, and some insist on the order of turns."""
    template, seconds, memory = json.load(sys.stdin)
    with suppress(ImportError):                         # Windows has the clock alone
        import resource
        for kind, most in (("CPU", seconds), ("AS", memory), ("CORE", 0)):
            with suppress(ValueError):                  # a stricter limit is set already, or the system knows none
                resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
    try:
        program = environment().from_string(template)
        for messages in PROBES:
            try:
                written(program, messages, {"bos_token": "<s>", "eos_token": "</s>"})
            except MemoryError:
                raise
            except Exception:
                continue
    except MemoryError as error:
        print(error if error.args else f"it needs more than {memory >> 20} MB for a short chat")
    except Exception as error:                          # it does not compile
        print(brief(str(error)))
