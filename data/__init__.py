"""Data: text and tokens, data sets, weights on disk, and the offline world in `barn`; and how a command ends."""
import contextlib
import difflib
import errno
import gzip
import json
import os
import re
import sys
import zlib
from pathlib import Path

from data.progress import Progress


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


def one_of(what, value, known):
    """InputError unless the value of `what`, a flag perhaps, is one of those that are known."""
    if value not in known:
        choices = ", ".join(filter(None, known))
        raise InputError(f"{what} {value!r} is not known{did_you_mean(value, known)}: choose from {choices}")


def read_text(path):
    """What a text file of the user's says, unpacked if it ends in .gz. InputError if it cannot be read."""
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: save it as UTF-8") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def read_json(path):
    """The JSON object in a file, {} if there is no such file; InputError if it is not one."""
    if not Path(path).exists():
        return {}
    text = read_text(path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object")
    return document


@contextlib.contextmanager
def loading(module, name):
    """Around a command's slow imports: Ctrl-C ends the command `name` by a sentence, where it is one."""
    try:
        yield
    except KeyboardInterrupt:
        if module != "__main__":
            raise
        print(f"{name}: interrupted while it was loading", file=sys.stderr)
        sys.exit(130)


def attempt(main, argv, name, kept):
    """Run a command -> its exit code; one sentence for all that can go wrong. `kept` says what is not lost."""
    try:
        main(argv)
        sys.stdout.flush()
        return 0
    except SystemExit as exit:          # argparse has said why
        return exit.code or 0
    except Refusal as error:
        code, said = error.code, error
    except BrokenPipeError:             # the reader of a pipe, head perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, said = 141, f"stopped, as nobody reads its output any more; {kept}"
    except OSError as error:
        full = error.errno == errno.ENOSPC
        code, said = (5 if full else 2), f"{'the disk is full' if full else error}; {kept}"
    except KeyboardInterrupt:
        code, said = 130, f"interrupted; {kept}"
    with contextlib.suppress(BrokenPipeError):          # who reads no output may read no errors either
        Progress.close()
        sys.stdout.flush()
        print(f"{name}: {said}", file=sys.stderr)
    return code


def run(main, name, kept):
    """Run a command on the arguments of this process, and end with its exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal that knows no "±" gets a question mark
    if code := attempt(main, sys.argv[1:], name, kept):
        sys.exit(code)
