"""The texts of the exercises: their commands can be typed, and the files and functions that they name are there."""
import re
import shlex
from pathlib import Path

import pytest

from data.barn.judge import SIM
from rlhf import plan

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text() for name in ("exercises/QUESTIONS.md", "exercises/BUGS.md", "AGENTS.md",
                                                      "CONTRIBUTING.md")}
COMMANDS = sorted({" ".join(found.split()) for text in TEXTS.values()
                   for found in re.findall(r"python farm\.py --method (?!NAME)[^`#]+?(?=`|\n    |\n\n|  #)", text)})
QUESTIONS = re.split(r"^## ", TEXTS["exercises/QUESTIONS.md"], flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_can_be_typed(line):
    """Its flags are known, its values make sense, and none of them is without effect."""
    _, _, _, method, *argv = shlex.split(line)
    plan.configured(plan.chosen(method), argv)


def test_there_are_commands_for_all_that_is_to_be_run():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda text: text.splitlines()[0])
def test_a_question_has_its_file_its_prediction_its_run_and_its_plot(question):
    for what in ("File", "Predict", "Run", "Plot"):
        assert f"* {what}:" in question
    file, rest = re.search(r"\* File: `([\w/.]+)`([^:.]*)", question).groups()
    source = (ROOT / file).read_text()
    for name in re.findall(r"`(\w+)`", rest):
        assert re.search(rf"^( *def {name}\(|{name} = )", source, re.MULTILINE), f"{file} has no {name}"


def test_there_are_twelve_questions_and_the_numbers_that_they_quote_are_those_of_the_code():
    assert [text.split(".")[0] for text in QUESTIONS] == [str(i) for i in range(1, 13)]
    assert f"4 instead of {SIM.words[0]:g}" in " ".join(QUESTIONS[7].split())


def test_the_modules_and_files_that_the_texts_name_are_there():
    for name, text in TEXTS.items():
        for module in set(re.findall(r"python -m (exercises\.(?!blank)\w+|benchmarks)", text)):
            path = ROOT.joinpath(*module.split("."))
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{name}: {module}"
        for path in set(re.findall(r"`((?:tests|rlhf|data|exercises|stats|studies|\.ci)/[\w/.]*)`", text)):
            assert (ROOT / path).exists(), f"{name}: {path}"
