"""Renders the chat template of a checkpoint in a sandbox. A template is a small program in the language jinja2.

The text is the same as that of transformers, byte for byte. A template may come from anywhere. Jinja2's sandbox, which
transformers uses too, keeps it from calling Python and from opening files, but not from using memory and time: one line
can ask for a string of 3 GB. Therefore every rendering has a budget (data/sandbox.py). Besides, a child process with
limits on both first renders a few test chats, once for each template: what breaks a limit there is refused.
"""
import json
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from data import InputError

LONGEST = 1 << 16                       # characters of a template; most have a few thousand
OUTPUT = 1_000_000                      # characters that a template may add to the messages of a chat
SECONDS, MEMORY = 10, 1 << 30           # limits of the child process, in CPU seconds and bytes; most need 0.1 s
PATIENCE = 12 * SECONDS                 # seconds until it is given up: a busy machine may leave it little of the CPU
OUT_OF_TIME = -getattr(signal, "SIGXCPU", 1 << 30)      # the exit status of a child that used up its CPU seconds

USER = {"role": "user", "content": "List two trees."}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "Oak and ash."}
ODD = {"role": "user", "content": " {{ 7 * 7 }} {% raw %} <|end|> \\ \" <b>&amp;</b> \0 é😀\r\n\n "}
TEST_CHATS = [USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [ODD]
CHILD = "import sys; sys.path = sys.argv[1:]; from data.template import render_test_chats; render_test_chats()"


@lru_cache(None)
def renderer(template):
    """A function render(messages, **values) that returns the text of a chat, up to where the answer begins.

    messages: [{"role", "content"}]. values: the template's variables, such as bos_token. InputError if jinja2 is too
    old, if the template breaks a limit, or, from render(), if it fails for this chat.
    """
    from importlib.metadata import version
    if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < (3, 1, 6):
        raise InputError(f"a chat template needs jinja2 3.1.6 or later, and here is {version('jinja2')}, whose "
                         "sandbox has known holes: pip install -U jinja2")
    if len(template) > LONGEST:
        raise InputError(f"the chat template has {len(template)} characters, more than {LONGEST}")
    if complaint := trial(template):
        raise InputError(f"the chat template fails: {complaint}")
    program = compiled(template)

    def render(messages, **values):
        try:
            return render_limited(program, messages, values)
        except Exception as error:                      # a template is a program: it can raise anything
            raise InputError(f"the chat template fails: {one_line(str(error) or type(error).__name__)}") from None
    return render


class Prompt(str):
    """A text for a model. `contents` has (start, end) of each part that a user or a data set has written. It may be
    empty if none of these parts looks like a control token of the template."""
    contents: ClassVar[list] = []

    def then(self, words, content):
        """This text, followed by words of the template and by a content."""
        longer = Prompt(self + words + content)
        longer.contents = [*self.contents, (len(self + words), len(longer))]
        return longer


def contents_of(text, messages, render):
    """The (start, end) of the contents of a chat in the text that render(messages) writes; None if it cannot be found.

    The chat is rendered again, with a mark before and a mark behind each content. If only the marks are new in that
    text, they show where the contents are. The rest may differ, too, if the template looks into the contents: some
    test how a message begins.
    """
    before, behind = unused_characters(text)
    try:
        marked = render([{**message, "content": surrounded(message.get("content"), before, behind)}
                         for message in messages])
    except InputError:
        return None
    same = marked.replace(before, "").replace(behind, "") == text
    return marked_parts(marked, before, behind) if same else None


def unused_characters(text):
    """Two characters of Unicode's private use area that are not in a text."""
    used = set(text)
    free = (c for c in map(chr, range(0xE000, 0xF900)) if c not in used)
    return next(free), next(free)


def surrounded(content, before, behind):
    """A content with marks around it, inside of the whitespace at its ends, which templates may strip."""
    if not isinstance(content, str) or not (core := content.strip()):
        return content
    return content.replace(core, before + core + behind, 1)


def marked_parts(marked, before, behind):
    """[(start, end)] of the marked parts of a text, as places in the text without the marks; None if marks are lost."""
    parts, start, at = [], None, 0
    for piece in re.split(f"([{before}{behind}])", marked):
        if piece in (before, behind):
            if (start is None) != (piece == before):
                return None
            if piece == behind:
                parts.append((start, at))
            start = at if piece == before else None
        else:
            at += len(piece)
    return parts if start is None else None


def compiled(template):
    """The program (jinja2's Template) of a chat template."""
    from data.sandbox import environment                # a command without chat templates needs no jinja2
    return environment().compiled(template)


def render_limited(program, messages, values):
    """The text that a compiled template writes; MemoryError if it adds more than OUTPUT characters to the messages, or
    takes more work or memory than any chat needs.

    The variables have the same defaults as in transformers: no tools, no documents, and the answer begins at the end.
    """
    from data.sandbox import budget
    pieces, room = [], OUTPUT + sum(len(str(message)) for message in messages)
    values = {"tools": None, "documents": None, "add_generation_prompt": True, **values}
    with budget(messages, values):
        for piece in program.generate(messages=messages, **values):
            room -= len(piece)
            if room < 0:
                raise MemoryError(f"it adds more than {OUTPUT} characters to a chat")
            pieces.append(piece)
    return "".join(pieces)


def one_line(message):
    """The message as one printable line of at most 300 characters: it may be a text of the template's author."""
    printable = "".join(c if c.isprintable() else " " for c in message[:300])
    return " ".join(printable.split())


# ---- the trial -----------------------------------------------------------------------------------------

@lru_cache(None)
def trial(template):
    """Render the test chats in a child process with limits; returns "" if it succeeds, and otherwise the reason why the
    template must not be rendered."""
    job = json.dumps([template, SECONDS, MEMORY])
    try:
        child = subprocess.run(                         # -I and -S: the child imports nothing from its environment
            [sys.executable, "-IS", "-X", "utf8", "-c", CHILD, str(Path(__file__).parents[1]), *sys.path], input=job,
            capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"it needs more than {PATIENCE} seconds for a short chat"
    if child.returncode == OUT_OF_TIME:
        return f"it needs more than {SECONDS} seconds of the CPU for a short chat"
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2]
        return f"it ends the process that tries it out, exit code {child.returncode} {one_line(last)}".rstrip()
    return child.stdout.strip()


def render_test_chats():
    """Runs in the child process: renders TEST_CHATS, and prints the reason if the template must not be rendered.

    A template may raise an exception for a test chat: some have no system role, and some want the turns in one order.
    It must not lose the user's text: some want contents that are lists, and write nothing of a text.
    """
    template, seconds, memory = json.load(sys.stdin)
    with suppress(ImportError):                         # on Windows only the timeout of the parent process holds
        import resource
        for kind, most, hard in (("CPU", seconds, seconds + 1), ("AS", memory, memory), ("CORE", 0, 0)):
            with suppress(ValueError):                  # a stricter limit is set already, or it cannot be set here
                resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, hard))
    try:
        program, lost = compiled(template), False
        for messages in TEST_CHATS:
            try:
                said = render_limited(program, messages, {"bos_token": "<s>", "eos_token": "</s>"})
            except MemoryError:
                raise
            except Exception:
                continue
            lost = lost or messages == [USER] and USER["content"].lower() not in said.lower()
        if lost:
            print("it loses the user's text")
    except MemoryError as error:
        print(error if error.args else f"it needs more than {memory >> 20} MB for a short chat")
    except Exception as error:                          # it does not compile
        print(one_line(str(error)))
