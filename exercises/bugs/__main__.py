"""Copy the project with a silent bug in it, for you to find.

python -m exercises.bugs 3                a copy in ../farm-bug3
python -m exercises.bugs 3 --out FOLDER   a copy elsewhere

exercises/BUGS.md says what to run in the copy, what to look at, and what a
healthy run shows.
"""
from pathlib import Path

from data import InputError, run
from data.flags import Parser
from exercises.bugs import apply, patches
from exercises.tree import copy_tree


def main(argv):
    parser = Parser("exercises.bugs", __doc__)
    parser.add("number", type=int, metavar="N", help="which bug")
    parser.add("--out", type=Path, metavar="FOLDER", help="where the copy goes (default: ../farm-bugN)")
    args = parser.parse(argv)
    if args.number not in patches():
        raise InputError(f"there is no bug {args.number}: choose from 1 to {max(patches())}")
    folder = args.out or Path("..") / f"farm-bug{args.number}"
    copy_tree(folder)
    apply(args.number, folder)
    print(f"{folder} is a copy of the project with bug {args.number} in it:\nexercises/BUGS.md says what to run there")


if __name__ == "__main__":
    run(main, "exercises.bugs", "a copy that is not whole can be removed")
