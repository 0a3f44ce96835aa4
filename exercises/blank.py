"""Copy the project without one of its functions, for a student to write it.

python -m exercises.blank gae               a copy in ../farm-gae
python -m exercises.blank gae clip          one copy without both
python -m exercises.blank all --out FOLDER  without any function of the list
python -m exercises.blank --list            the list

A function keeps its signature, its decorators and its docstring; its body
raises NotImplementedError. Results of runs and git's history are not copied.
"""
from importlib.util import find_spec
from pathlib import Path

from data import InputError, one_of, run
from data.flags import Parser
from exercises import BLANKS
from exercises.tree import copy_tree, without_body
from stats.tables import table


def take_out(blank, folder):
    """Blank a function in the copy in this folder."""
    path = folder / blank.file
    sentence = f"{blank.function}() in {blank.file} is yours to write: {blank.tests} says what must hold"
    path.write_text(without_body(path.read_text(encoding="utf-8"), blank.function, sentence), encoding="utf-8")


def listed():
    """What can be taken out, as a table."""
    return table(["name", "function", "file", "source (arXiv)"], *(
        [blank.name, blank.function, blank.file, blank.source] for blank in BLANKS.values()))


def next_steps(blanks, folder):
    """What to type in the copy, as text."""
    lines = [f"{folder} is a copy of the project. Missing in it:", ""]
    for blank in blanks:
        lines += [f"  {blank.function}() in {blank.file}",
                  f"    python -m pytest {blank.tests}", f"    python {blank.run}"]
    lines += ["", "The tests are red until the function is right. Type both commands there:", f"  cd {folder}"]
    if not find_spec("pytest"):
        lines += ["The tests need pytest: pip install pytest"]
    return "\n".join(lines)


def main(argv):
    parser = Parser("exercises.blank", __doc__)
    parser.add("names", nargs="*", metavar="NAME", help="functions of the list, or all")
    parser.add("--list", action="store_true", help="print the list: names, functions, files, papers")
    parser.add("--out", type=Path, metavar="FOLDER", help="where the copy goes (default: ../farm-NAME)")
    args = parser.parse(argv)
    if args.list:
        return print(listed())
    if not args.names:
        raise InputError(f"which function? Give {', '.join(BLANKS)} or all; --list says what they are")
    for name in args.names:
        one_of("function", name, (*BLANKS, "all"))
    blanks = [blank for blank in BLANKS.values() if blank.name in args.names or "all" in args.names]
    folder = args.out or Path("..") / f"farm-{'-'.join(args.names)}"
    copy_tree(folder)
    for blank in blanks:
        take_out(blank, folder)
    print(next_steps(blanks, folder))


if __name__ == "__main__":
    run(main, "exercises.blank", "the project itself is as it was")
