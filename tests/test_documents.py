"""What README.md and farm.ipynb say can be done: every command runs, or its flags are known; every file is there."""
import argparse
import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import ROOT, command
from documents import NOTEBOOK, README, in_line, in_notebook, in_readme, of_farm, quick, source
from quick import slowly

from rlhf import methods, plan
from studies import kit, studies

# What stands for something in a command, and what this test takes for it.
MEANS = {"PAIRS.json": "runs/barn/pairs/pairs.json", "LABELS.json": "runs/barn/pairs/pairs.json",
         "CROWD.json": "runs/barn/pairs/pairs.json", "HUMAN.json": "people.json", "me.json": "people.json",
         "OUT.json": "runs/barn/dpo/outputs.json", "REF.json": "runs/barn/sft/outputs.json",
         "SIMULATED.csv": "data/alpacafarm.csv:simulated", "HUMAN.csv": "data/alpacafarm.csv:human",
         "pairs/train.jsonl": "train.jsonl", "runs/x": "runs/barn", "runs/x/dpo": "runs/barn/dpo", "MODEL": "barn",
         "METHOD": "dpo"}
# Commands that are not run here, and why. Their flags are checked.
NOT_RUN = {"the hub": r"--model (?!barn\b|runs/)|Qwen/|--data alpaca_farm", "a person": r"--judge me\b",
           "a server that does not end by itself": r"serve\.py(?!.* --ask )",
           "minutes": r"-m benchmarks|-m data\.barn\.pretrain",
           "copies of the project: test_exercises_*.py": r"-m exercises\.(blank|bugs|grade|plot)",
           "a study, whose own test runs it": r"--study (?!.*--help)",
           "files from elsewhere": r"-m rlhf\.reward_bench|--arena_hard"}
ELSEWHERE = r"-m pytest|-m openrlhf|-m json\.tool|--method hinge"     # other projects', this one's tests, a new file
MADE = {"rlhf/hinge.py", "my.py"}                       # named where README says how to write them


def filled(words):
    """A command without words that stand for something."""
    return [MEANS.get(word, word) for word in words if word != "[flags]"]


def unique(commands):
    """shlex.join of each command that is the project's own."""
    lines = dict.fromkeys(shlex.join(filled(words)) for words in commands)
    return [line for line in lines if not re.search(ELSEWHERE, line)]


def reason(line):
    return next((why for why, pattern in NOT_RUN.items() if re.search(pattern, line)), "")


OF_README, OF_NOTEBOOK = unique(in_readme()), unique(in_notebook())
LISTS = ["python farm.py --list"]       # which takes no other flag
RUN = [line for line in OF_README if not reason(line)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with the run folders and files that commands of README begin with."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data" / "alpacafarm.csv", folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeeded("python farm.py --method dpo")
        for seed in range(3):
            succeeded(f"python farm.py --method sft --seed {seed} --out runs/seed{seed}")
        succeeded("python annotate.py runs/barn/pairs/pairs.json --judge barn-human --out people.json")
    return folder


def succeeded(line):
    _, script, *argv = quick(shlex.split(line))
    result = command(script, *argv)
    assert result.code == 0 and not result.err, result.err
    return result.out


@pytest.mark.filterwarnings("ignore:'[a-z.]+' found in sys.modules")
@pytest.mark.parametrize("line", [slowly(line) if "--method all" in line else line for line in RUN])
def test_a_command_of_readme_runs(workshop, monkeypatch, tmp_path, line):
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    own = f" --out {tmp_path / 'run'}" * ("farm.py --" in line and not {"--help", "--list"} & {*line.split()})
    assert succeeded(line + own)


class Parsed(BaseException):
    """Raised in the place of what a command does once it has read its flags; unknown: those that it does not know."""

    def __init__(self, unknown):
        self.unknown = unknown


def flags_are_known(line, monkeypatch):
    _, script, *argv = words = shlex.split(line)
    if "--study" in words:
        at = argv.index("--study")
        return kit.parse(argv[at + 1], argv[:at] + argv[at + 2:])
    if "--method" in words:
        return plan.configured(*of_farm(words))
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *args, **options):
        raise Parsed(parse(self, *args, **options)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    with pytest.raises(Parsed) as stopped:
        command(script, *argv)
    assert not stopped.value.unknown


@pytest.mark.parametrize("line", [
    *filter(reason, OF_README), *(line for line in OF_NOTEBOOK if line not in OF_README + LISTS)])
def test_the_flags_of_a_command_that_is_not_run_here_are_known(monkeypatch, line):
    flags_are_known(line, monkeypatch)


@pytest.mark.parametrize("line", ["python eval.py runs/barn --shwo 3", "python farm.py --method dpo --bta .2",
                                  "python farm.py --study cost --qiuck", "python -m benchmarks h200 --outt x"])
def test_unknown_flags_are_found(monkeypatch, line):
    with pytest.raises((AssertionError, ValueError)):
        flags_are_known(line, monkeypatch)


def test_commands_are_found_wherever_they_stand():
    assert in_line("pip install x && python farm.py --method dpo   # minutes") == [
        ["python", "farm.py", "--method", "dpo"]]
    assert in_line("if [ -d x ]; then python a.py > y; else echo no; fi") == [["python", "a.py"]]
    assert in_line('python serve.py runs/a --ask "What; why?"') == [["python", "serve.py", "runs/a", "--ask",
                                                                     "What; why?"]]
    assert len(RUN) >= 12 and len(OF_README) >= 25 and len(OF_NOTEBOOK) >= 10
    assert "python annotate.py runs/barn/pairs/pairs.json --judge me --out people.json" in OF_README


# ---- names ---------------------------------------------------------------------------------------------

TEXT = README + "\n".join(map(source, NOTEBOOK["cells"]))


def test_methods_studies_and_results_that_are_named_exist():
    for name in re.findall(r"farm\.py --method (\w+)", TEXT):
        assert name in (*methods(), "all", "NAME") or f"`rlhf/{name}.py`" in TEXT, name
    for name in re.findall(r"farm\.py --study (\w+)", TEXT):
        assert name in (*studies(), "NAME"), name
    for path in re.findall(r"studies/results/[\w.]+", TEXT):
        assert (ROOT / path).exists(), path
    assert not re.findall(r"@[A-Z]+@", TEXT), "a placeholder is left"


def test_files_that_are_named_exist():
    """`rlhf/dpo.py`, `data/judges/`, `farm.py`: paths of the project in backquotes."""
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs"}
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)(?:::\w+)?`", TEXT)
    ours = {name for name in named if name.split("/")[0] in rooms and "/" in name or re.fullmatch(r"\w+\.py", name)}
    assert len(ours) > 30
    assert not [name for name in ours - MADE if not (ROOT / name).exists()]


def test_readme_and_notebook_name_one_place_of_the_project():
    places = set(re.findall(r"github\.com/(\w[\w-]*/[\w-]+)(?=[ /)])", TEXT.replace("/github/", "/github.com/")))
    assert len(places) == 1 and "blob/main/farm.ipynb" in README, places


def test_what_the_notebook_imports_is_the_project_s():
    code = "\n".join(source(cell) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    for module in re.findall(r"^from (\S+) import", code, re.MULTILINE):
        assert module == "IPython.display" or Path(ROOT, *module.split(".")).with_suffix(".py").exists(), module
