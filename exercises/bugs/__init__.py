"""Find the bug: eight patches, each of which puts one silent bug into a copy of the project.

Each buggy copy runs without an error, and most of its curves look as they should. exercises/BUGS.md says what to run
and what to look at. The patches lie beside this file; reading them spoils the exercise.
"""
import re
from pathlib import Path

from data import InputError


def patches():
    """{number: file} of the patches."""
    return {int(path.stem.removeprefix("bug")): path for path in sorted(Path(__file__).parent.glob("bug*.patch"))}


def edits(patch):
    """(file, [(old text, new text)]) of the text of a unified diff of one file."""
    head, *hunks = re.split(r"^@@ .*\n", patch, flags=re.MULTILINE)
    file = re.search(r"^\+\+\+ b/(\S+)", head, re.MULTILINE)[1]
    return file, [(side(hunk, " -"), side(hunk, " +")) for hunk in hunks]


def side(hunk, marks):
    """The lines of a hunk that begin with one of the marks, without it."""
    return "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in marks)


def apply(number, folder):
    """Apply a patch to the copy of the project in a folder. Lines may have moved since the patch was made; InputError
    if they have changed."""
    path = patches()[number]
    file, changes = edits(path.read_text(encoding="utf-8"))
    text = (folder / file).read_text(encoding="utf-8")
    for old, new in changes:
        if text.count(old) != 1:
            raise InputError(f"{path} does not fit this version of the project")
        text = text.replace(old, new)
    (folder / file).write_text(text, encoding="utf-8")
