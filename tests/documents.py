"""The commands that README.md and farm.ipynb show: where they are, and their quickest form."""
import json
import re
import shlex
from dataclasses import fields

from commands import ROOT

from rlhf import config, plan

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "farm.ipynb").read_text(encoding="utf-8"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^ {4}(python .*)$", re.MULTILINE)
INLINE = re.compile(r"`(python\s[^`]+)`")
TINY = {"limit": 16, "max_new_tokens": 16, "steps": 1, "rounds": 1, "updates": 1, "epochs": 1, "n": 2, "prompts": 16,
        "rollout_batch": 16, "batch_size": 16, "val_prompts": 16, "scale_answers": 16}


def source(cell):
    return "".join(cell["source"])


def in_line(line):
    """[[word]] of the `python ...` commands in a line of a shell, also behind && or in an if."""
    found, words = [], shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split, going_on = True, False
    for word in words:
        if word == "python":
            found.append([])
        going_on = word == "python" or going_on and not set(word) <= set("&|;<>()")
        if going_on:
            found[-1].append(word)
    return found


def in_readme():
    """[[word]] of all commands in README: of its blocks of shell, and of its sentences."""
    blocks = [body for language, body in FENCED.findall(README) if language in ("", "bash", "sh")]
    prose = FENCED.sub("", README)
    spans = [" ".join(span.split()) for span in INLINE.findall(prose)]
    lines = "\n".join([*blocks, *INDENTED.findall(prose.replace("\\\n", ""))]).replace("\\\n", "").splitlines()
    lines = [line for line in lines if line.strip().startswith(("python ", "pip "))]
    return [words for line in [*lines, *spans] for words in in_line(line)]


def in_notebook():
    """[[word]] of all commands in the cells of the notebook."""
    cells = [source(cell).replace("\\\n", "") for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in cell.splitlines()]
    return [words for line in lines if line.startswith(("!", "%run "))
            for words in in_line(line.removeprefix("!").replace("%run ", "python "))]


def quick_cell(text):
    """The source of a cell whose training commands are quick()."""
    lines = []
    for line in text.splitlines():
        if line.startswith("!python farm.py --method"):
            words = shlex.split(line.removeprefix("!"))
            line = f"{line} {shlex.join(quick(words)[len(words):])}"
        lines.append(line)
    return "\n".join(lines)


def of_farm(words):
    """(methods, flags of stages) of a command `python farm.py --method ...`."""
    at = words.index("--method")
    rest = words[2:at] + words[at + 2:]
    if "--seeds" in rest:
        at = rest.index("--seeds")
        rest = rest[:at] + rest[at + 2:]
    return plan.chosen(words[words.index("--method") + 1]), rest


def quick(words):
    """A command with smaller settings: a few records, short answers, a step or two, one seed."""
    if "--help" in words or "--rankings" in words:
        return words
    if "--method" in words:
        methods, rest = of_farm(words)
        configs, _ = plan.configured(methods, rest)
        return [*words, *tiny(methods, configs), *["--seeds", "0"] * ("--seeds" in words)]
    limited = words[1] == "annotate.py" or {"--outputs", "--attack"} & set(words)
    return [*words, "--limit", "16"] if limited and "--limit" not in words else words


def tiny(methods, configs):
    """TINY as flags of the methods of a command and of the stages that they need."""
    shared = {f.name for f in fields(config.Config)}
    flags = []
    for method, cfg in configs.items():
        own = {f.name for f in fields(cfg)} & TINY.keys() - shared
        prefix = "" if methods == [method] else f"{method}."
        flags += [word for name in sorted(own) for word in (f"--{prefix}{name}", str(TINY[name]))]
    return flags + [word for name in sorted(TINY.keys() & shared) for word in (f"--{name}", str(TINY[name]))]
