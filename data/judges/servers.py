"""Where a judge is: the server that the environment names, or a checkpoint that is served here."""
import contextlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from data import InputError, from_json
from data.alpaca_eval import question
from data.judges import JudgeError
from data.loopback import ADDRESS, on_this_machine


def remote(replay=False):
    """base_url, key, headers and url of the server that the environment names."""
    env, azure = os.environ, os.environ.get("AZURE_OPENAI_ENDPOINT", "").rstrip("/")
    azure = azure if not (env.get("OPENAI_BASE_URL") or env.get("OPENAI_API_BASE")) else ""
    base_url = azure or env.get("OPENAI_BASE_URL") or env.get("OPENAI_API_BASE") or "https://api.openai.com/v1"
    base_url, name = base_url.rstrip("/"), "AZURE_OPENAI_API_KEY" if azure else "OPENAI_API_KEY"
    key = env.get(name, "").strip()
    if not ADDRESS.fullmatch(base_url):             # not shown: URLs have been seen with passwords in them
        raise JudgeError(f"{'AZURE_OPENAI_ENDPOINT' if azure else 'OPENAI_BASE_URL'} must look like "
                         "https://host/v1 or http://localhost:8000/v1")
    if not key and not replay and not on_this_machine(base_url):
        raise JudgeError(f"{name} is not set, and {base_url} is not on this machine: export it (any word will do "
                         "for a server without keys)")
    if not re.fullmatch(r"[!-~]*", key):            # requests would show it in its own error
        raise JudgeError(f"{name} holds a space or another character that no key has")
    if azure:
        version = env.get("OPENAI_API_VERSION", "2024-10-21")
        return {"base_url": base_url, "key": key, "headers": {"api-key": key} if key else {},
                "url": lambda model: f"{base_url}/openai/deployments/{model}/chat/completions?api-version={version}"}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for header, variable in (("OpenAI-Organization", "OPENAI_ORG_ID"), ("OpenAI-Project", "OPENAI_PROJECT_ID")):
        headers |= {header: env[variable]} if env.get(variable) else {}
    return {"base_url": base_url, "key": key, "headers": headers}


@contextlib.contextmanager
def served(judge):
    """Serve the checkpoint of "serve:PATH" from a process of its own; yields the base URL.

    Its standard input is a pipe that closes with this process, however this one ends, and ends the server, too. It is
    in a session of its own, so that Ctrl-C does not reach it while a step is finished that needs it.
    """
    command = [sys.executable, str(Path(__file__).parents[2] / "serve.py"), judge[6:], "--port", "0", "--name", judge,
               "--until_eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as server:
        try:
            url = next(filter(None, (re.search(r"http://\S+/v1", line) for line in server.stdout)), None)
            if not url:
                raise JudgeError(f"serve.py could not serve {judge[6:]}")
            yield url[0]
        finally:
            server.kill()                               # it has nothing to save


def fingerprint(path):
    """What a checkpoint's answers are filed under: other weights in the same place are another judge."""
    files = sorted(Path(path).rglob("*.safetensors")) if Path(path).is_dir() else []
    return "serve:" + ",".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def extra_of(body="", effort="", max_tokens=0):
    """What goes into every request, and so into its name in the cache: of --judge_body and the flags beside it."""
    try:
        extra = from_json("--judge_body", body or "{}")
        wrong = extra.keys() & {"model", "messages", "stream", "n", "max_tokens", "logprobs", "top_logprobs"}
    except (ValueError, AttributeError):
        raise InputError(f"--judge_body {body}: a JSON object, as in '{{\"service_tier\": \"flex\"}}'") from None
    if wrong or max_tokens < 0:
        raise InputError(f"--judge_body cannot set {min(wrong)}" if wrong else "--max_tokens is not negative")
    flags = {"reasoning_effort": effort, "max_tokens": max_tokens}
    return extra | {name: value for name, value in flags.items() if value}


def at_home(pairs):
    """The judge of those who name none: "barn", which knows the texts of the offline world only."""
    from data.barn.judge import knows           # real judges do without the offline world
    strange = next((pair["instruction"] for pair in pairs if not knows(question(pair))), None)
    if strange is not None:
        raise InputError(f"who judges? --judge MODEL (barn knows its own world only, not {strange!r:.60})")
    return "barn"


def add_flags(add):
    """The flags that are about how a judge is asked, for a command's parser."""
    add("--workers", type=int, default=8, help="requests to the judge at the same time, at most")
    add("--max_unusable", type=float, default=.02, help="stop if a larger share of the verdicts is unusable")
    add("--timeout", type=float, default=120, metavar="S", help="seconds that one reply may take")
    add("--max_tokens", type=int, default=0, metavar="N", help="longest reply (default: what the annotator needs)")
    add("--reasoning_effort", default="", metavar="none|low|...", help="how long a model thinks (default: its own; "
        "for a single letter not at all)")
    add("--judge_body", default="", metavar="JSON", help="goes into every request: '{\"service_tier\": \"flex\"}'")
    add("--ask_again", default="", metavar="unusable", help="ask anew for verdicts that were unusable when they came")


def options(args):
    """What these flags, or the fields of the same names, mean to `annotate.connect`."""
    if not 1 <= args.workers <= 1000 or not 0 <= args.max_unusable <= 1 or not 0 < args.timeout < math.inf:
        raise InputError("--workers lies between 1 and 1000, --max_unusable between 0 and 1, --timeout is a number of "
                         "seconds")
    if args.ask_again not in ("", "unusable"):
        raise InputError(f"--ask_again {args.ask_again}: only what was unusable is asked again: --ask_again unusable")
    extra = extra_of(args.judge_body, args.reasoning_effort, args.max_tokens)
    return {"workers": args.workers, "max_unusable": args.max_unusable, "timeout": args.timeout, "extra": extra,
            "ask_again": bool(args.ask_again)}
