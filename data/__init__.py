"""Data: text and tokens, data sets, weights on disk, and the offline world in `barn`; and how a command ends."""
import contextlib
import difflib
import errno
import gzip
import json
import math
import os
import re
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

from data import interrupts
from data.progress import Progress


FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}      # no room: disk, file size, quota


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
    """Flags with underscores, however they were written: --max-calls=3 is --max_calls=3. InputError for --flag=--, of
    which argparse makes an empty list."""
    if wrong := [token for token in argv if re.fullmatch(r"--[\w.-]+=--", token)]:
        raise InputError(f"{wrong[0]}: -- is no value")
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


def writable(folder):
    """Make a folder, if it is not there. InputError if nothing can be written to it."""
    if not str(folder).strip():
        raise InputError("--out is empty: choose a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno in FULL:
            raise
        raise InputError(f"nothing can be written to {folder} ({error.strerror}): choose another --out") from None


# ---- JSON that a user hands in -------------------------------------------------------------------------

DEEPEST = 50                            # lists and objects within each other; with more, Python's own functions fail
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # how half of a surrogate pair is written; each half of an emoji is one


def decode(text, rows=False):
    """The value of a JSON text. ValueError if it is malformed, or a key is there twice, or a number is too large for a
    float. rows: read NaN as null, since pandas and datasets write it for a cell without a value."""
    return (ROWS if rows else DOCUMENTS).decode(text)


def unique(pairs):
    """The object of these (key, value); ValueError if a key is there twice, as nobody knows which one is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{key!r:.99} is there twice")
    return found


def real(digits):
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits:.20}{'...' * (len(digits) > 20)} is too large")
    return value


def whole(digits):
    real(digits)                        # what no float can hold fails somewhere later
    return int(digits)


def no_number(name):
    raise ValueError(f"{name} is no number in JSON")


def null_for_nan(name):
    return None if name == "NaN" else no_number(name)


DOCUMENTS, ROWS = (
    json.JSONDecoder(object_pairs_hook=unique, parse_int=whole, parse_float=real, parse_constant=constant)
    for constant in (no_number, null_for_nan))


def check_value(value, halves=True):
    """ValueError if a value that was read from JSON is nested too deeply or has half of a surrogate pair, which is no
    text. halves: whether there may be one."""
    level = [value]
    for _ in range(DEEPEST):
        if not level:
            break
        level = [each for one in level if isinstance(one, (dict, list))
                 for each in (one.values() if isinstance(one, dict) else one)]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    if halves:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half of a surrogate pair, which is no text") from None


def from_json(where, text):
    """The value of a JSON text; InputError, which says where it is from, if it cannot be used."""
    try:
        value = decode(text)
        check_value(value, HALF.search(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    return value


def read_json(path):
    """The JSON object in a file, {} if there is no such file; InputError if it is not one."""
    if not Path(path).exists():
        return {}
    document = from_json(path, read_text(path))
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object")
    return document


def is_number(value):
    return type(value) in (int, float)


TEXT = "a text", lambda value: isinstance(value, str)
PATH = "a path", lambda value: isinstance(value, str) and "\0" not in value
NUMBER = "a number", is_number
COUNT = "a whole number of at least 0", lambda value: type(value) is int and value >= 0
OBJECT = "an object", lambda value: isinstance(value, dict)


def check_kinds(where, document, kinds):
    """InputError if a document (a dict) has a value that does not fit. kinds: {key: (what it is, whether it fits)}."""
    for key, (what, fits) in kinds.items():
        if key in document and not fits(document[key]):
            raise InputError(f"{where}: {key!r} must be {what}, not {document[key]!r:.60}")


# ---- how a command ends --------------------------------------------------------------------------------

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
        with interrupts.heard():
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
        full = error.errno in FULL
        code, said = (5 if full else 2), f"{'the disk is full' if full else error}; {kept}"
    except KeyboardInterrupt as error:
        code, said = getattr(error, "code", 130), f"interrupted; {kept}"
    with contextlib.suppress(BrokenPipeError):          # who reads no output may read no errors either
        Progress.close()
        sys.stdout.flush()
        said = " ".join(str(said).split())              # it may quote what a file says: lines, and megabytes
        print(f"{name}: {said if len(said) <= 900 else f'{said[:600]} ... {said[-290:]}'}", file=sys.stderr)
    return code


def run(main, name, kept):
    """Run a command on the arguments of this process, and end with its exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal that knows no "±" gets a question mark
    if code := attempt(main, sys.argv[1:], name, kept):
        sys.exit(code)
