"""Data: text and tokens, data sets, weights on disk, and the offline world in `barn`; and how a command ends."""
import difflib
import errno
import json
import os
import re
import sys
from pathlib import Path


class Refusal(Exception):
    """What a user can cause; the message is one sentence that says what happened and what to try."""
    code = 1                            # the exit code of a command that ends by it


class InputError(Refusal, ValueError):
    """Something that the user gave cannot be used."""
    code = 2


class OutOfMemory(Refusal):
    """What is asked for does not fit; the message says what would take less."""
    code = 4


def underscored(argv):
    """Flags with underscores, however they were written: --max-calls=3 is --max_calls=3."""
    return [re.sub(r"^--[\w-]+", lambda match: "--" + match[0][2:].replace("-", "_"), token) for token in argv]


def did_you_mean(word, known):
    """" (did you mean X?)" with the one of the known words that is most like `word`; "" if none is."""
    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def read_json(path):
    """The JSON object in a file, {} if there is no such file; InputError if it is not one."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object")
    return document


def run(main, name, kept):
    """Run a command: one sentence and an exit code for all that can go wrong; `kept` says what is not lost."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal that knows no "±" gets a question mark
    try:
        main(sys.argv[1:])
    except Refusal as error:
        sys.stdout.flush()
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.code)
    except BrokenPipeError:             # the reader of a pipe, head perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        full = error.errno == errno.ENOSPC
        print(f"{name}: {'the disk is full' if full else error}; {kept}", file=sys.stderr)
        sys.exit(5 if full else 2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {kept}", file=sys.stderr)
        sys.exit(130)
