"""Learning from feedback, a file for each idea.

Reading order: sft, pairs, dpo, reward, best_of_n, expert_iteration, ppo; then grpo, rloo, reinforce, online_dpo,
iterated_dpo.

A method is a file that has NEEDS (what must have run before), Config (its knobs) and run(cfg) -> metrics at its top
level, its own or imported from another method. It is found by its name: add a file, edit nothing. Files without the
three are the kit, what methods share.
"""
import ast
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
DECODER = "model.py", "mixture.py", "products.py"
PARTS = ("NEEDS", "Config", "run")      # of a method


def parse(name):
    """The syntax tree of rlhf/<name>.py."""
    return parsed((FOLDER / f"{name}.py").read_text(encoding="utf-8"))


parsed = lru_cache(None)(ast.parse)     # of a source text; a study asks many times which methods there are


@lru_cache(None)
def bound(tree):
    """The names that a file binds at its top level: by assignment, def, class or import."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return names


def lacks(name):
    """Which of a method's parts the file rlhf/<name>.py does not have; read, not imported."""
    names = bound(parse(name))
    return [part for part in PARTS if part not in names]


def methods():
    """The names that `farm.py --method` takes."""
    found = []
    for file in sorted(FOLDER.glob("[a-zA-Z]*.py")):
        try:
            if not lacks(file.stem):
                found.append(file.stem)
        except SyntaxError:             # being written; the others can be used
            pass
    return found


def about(name):
    """The first line of a method's docstring."""
    return (ast.get_docstring(parse(name)) or "").partition("\n")[0]
