"""A copy of the project without some of its functions: nothing else is missing, and the tests of a blank are red."""
import ast
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import ROOT, command, refused

from exercises import BLANKS, blank, tree


def python(folder, *argv):
    return subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True, timeout=300)


def function(folder, one):
    """The syntax tree of a function in a copy."""
    tree = ast.parse((folder / one.file).read_text())
    return next(node for node in tree.body if getattr(node, "name", "") == one.function)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The folder of a copy in which all functions are blank."""
    folder = tmp_path_factory.mktemp("copies") / "all"
    command("exercises/blank.py", "all", "--out", folder)
    return folder


def failures(folder, *files):
    """{(name of the blank, name of the test): message, "" if it passed} of tests that run in a copy."""
    python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=tests.xml", *files)
    return {(case.get("classname").rpartition("test_")[2], case.get("name")):
            "".join(failure.get("message") for failure in case.findall("failure"))
            for case in ElementTree.parse(folder / "tests.xml").iter("testcase")}


def test_every_blank_is_a_function_with_a_docstring_and_tests():
    for one in BLANKS.values():
        assert ast.get_docstring(function(ROOT, one)) and (ROOT / one.tests).exists(), one.name
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "exercises" / "tests").glob("test_*.py")}
    assert tests == BLANKS.keys()


def test_a_copy_has_all_files_and_lacks_only_the_bodies(everything):
    assert {path.relative_to(everything) for path in everything.rglob("*") if path.is_file()} == set(tree.files())
    blanked = {one.file for one in BLANKS.values()}
    for path in tree.files():
        if str(path) not in blanked:
            assert (everything / path).read_bytes() == (ROOT / path).read_bytes(), path
    for one in BLANKS.values():
        was, now = function(ROOT, one), function(everything, one)
        assert ast.get_docstring(now) == ast.get_docstring(was) and ast.dump(now.args) == ast.dump(was.args)
        assert [ast.unparse(node).partition("(")[0] for node in now.body[1:]] == ["raise NotImplementedError"]
    for file in blanked:
        names = [one.function for one in BLANKS.values() if one.file == file]
        was, now = ((folder / file).read_text() for folder in (ROOT, everything))
        for name in names:
            was = tree.without_body(was, name, "")
            now = tree.without_body(now, name, "")
        assert now == was, "another line of the file has changed"


@pytest.mark.slow
def test_what_is_not_blank_still_runs(everything):
    front = python(everything, "farm.py")
    assert front.returncode == 0 and "Methods (" in front.stdout, front.stderr
    modules = ", ".join(one.module for one in BLANKS.values())
    assert python(everything, "-c", f"import {modules}").returncode == 0


@pytest.mark.slow
def test_the_tests_of_every_blank_are_red_and_say_what_is_to_be_written(everything):
    found = failures(everything, "exercises/tests")
    for one in BLANKS.values():
        said = [message for (name, _), message in found.items() if name == one.name]
        assert len(said) >= 5 and all(message.startswith("NotImplementedError") for message in said if message)
        assert sum(map(bool, said)) >= .7 * len(said), f"{one.name}: most tests pass without the function"
        assert any(f"{one.function}() in {one.file} is yours to write" in message for message in said)


@pytest.mark.slow
def test_one_blank_leaves_the_other_tests_green(tmp_path):
    result = command("exercises/blank.py", "gae", "--out", tmp_path / "copy")
    assert result.code == 0 and "python -m pytest exercises/tests/test_gae.py" in result.out
    assert max(map(len, result.out.replace(str(tmp_path), "..").splitlines())) <= 80
    found = failures(tmp_path / "copy", "exercises/tests/test_gae.py", "exercises/tests/test_whiten.py")
    assert {name for (name, _), message in found.items() if message} == {"gae"}
    assert {name for name, _ in found} == {"gae", "whiten"}


def test_a_copy_can_be_copied_where_there_is_no_git(everything, tmp_path):
    (everything / "runs" / "barn").mkdir(parents=True)
    (everything / "runs" / "barn" / "config.json").write_text("{}")
    result = python(everything, "-m", "exercises.blank", "mask", "--out", str(tmp_path / "second"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "second" / "rlhf" / "ppo.py").exists() and not (tmp_path / "second" / "runs").exists()


def test_decorators_and_neighbours_stay():
    head, neighbour = '@cached\ndef f(x):\n    """What it is."""\n', "\n\ndef g(x):\n    return x\n"
    without = tree.without_body(f"{head}    y = x\n    return y\n{neighbour}", "f", "Write it.")
    assert without == f'{head}    raise NotImplementedError("Write it.")\n{neighbour}'


def test_mistakes_are_one_sentence_and_change_nothing(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    refused(command("exercises/blank.py", "gae", "--out", tmp_path), 2, "is not empty: give another folder with --out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    refused(command("exercises/blank.py", "gae", "--out", tmp_path / "mine.txt"), 2, "is not empty")
    refused(command("exercises/blank.py", "gea", "--out", tmp_path / "new"), 2, "'gea' is not known .did you mean gae")
    refused(command("exercises/blank.py"), 2, "which function")
    assert not (tmp_path / "new").exists()


def test_the_list_names_functions_files_and_papers():
    listed = command("exercises/blank.py", "--list").out
    for one in BLANKS.values():
        assert all(text in listed for text in (one.name, one.function, one.file, one.source))
    assert max(map(len, listed.splitlines())) <= 80


def test_the_default_folder_is_beside_the_project(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(blank, "copy_tree", made.append)
    monkeypatch.setattr(blank, "take_out", lambda one, folder: None)
    blank.main(["gae", "clip"])
    assert made == [Path("../farm-gae-clip")]
