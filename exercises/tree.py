"""The files of the project, and its source files without the functions that students write."""
import ast
import shutil
import subprocess
from pathlib import Path

from data import InputError
from exercises import BLANKS

ROOT = Path(__file__).parents[1]
NOT_OURS = {"runs", "__pycache__"}      # where git cannot say what belongs to the project


def files():
    """The files of the project, as paths from its root: what git tracks, or in a copy without git what lies there."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        found = map(Path, listed.stdout.rstrip("\0").split("\0"))
        return [path for path in found if (ROOT / path).is_file()]
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [path for path in found if not NOT_OURS & set(path.parts)
            and not any(part.startswith(".") for part in path.parts[:-1])]


def copy_tree(folder):
    """Copy the project into a folder, without results of runs and without git's history. InputError if something is
    there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: give another folder with --out, or remove it")
    for path in files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)


def without_body(source, function, sentence):
    """The text of a Python file in which the body of a function, but for its docstring, raises NotImplementedError."""
    node = next(node for node in ast.parse(source).body if getattr(node, "name", "") == function)
    last = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    lines = source.splitlines(keepends=True)
    return "".join([*lines[:last], f'    raise NotImplementedError("{sentence}")\n', *lines[node.end_lineno:]])


def beside_the_blanks(folder, path):
    """What a source file in a folder does, apart from the functions that students write; "" if it cannot be read."""
    try:
        source = (folder / path).read_text(encoding="utf-8")
        for blank in BLANKS.values():
            if blank.file == path.as_posix():
                source = without_body(source, blank.function, "")
        return ast.dump(ast.parse(source))
    except (OSError, ValueError, SyntaxError, StopIteration):
        return ""


def differs(folder, path):
    """Whether more of a file in a folder differs from the project than what students write."""
    if path.suffix == ".py":
        return beside_the_blanks(folder, path) != beside_the_blanks(ROOT, path)
    return not (folder / path).is_file() or (folder / path).read_bytes() != (ROOT / path).read_bytes()


def changed(folder):
    """The files that models are made of, sources and data, which differ more than students have to change them."""
    parts = [path for path in sorted(files()) if path.suffix == ".py" or path.parts[0] == "data"]
    return [path.as_posix() for path in parts if not {"tests", "exercises"} & set(path.parts) and differs(folder, path)]
