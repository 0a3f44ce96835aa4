"""The house: imports point down, four packages, every file says what it is, the README's map is true."""
import ast
import importlib
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement        # pytest needs it

from data.judges.prompts import paper_pool, single, template
from data.judges.verdicts import READERS
from rlhf import config, methods
from studies import studies

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "pairs", "reward", "rewards")          # what methods start from; rewards may be the reward model
OURS = {"farm", "model", "mixture", "products", "annotate", "eval", "stats", "serve", "benchmarks", "rlhf", "studies",
        "data", "exercises", "tests"}
PACKAGES = {"torch", "tokenizers", "requests", "numpy"}
PEERS = {"transformers", "peft", "trl", "datasets"}     # what benchmarks measures beside, if installed
NO_TORCH = ("annotate", "eval", "data.judges", "data.judges.prompts", "data.judges.client", "data.judges.cache",
            "stats", "stats.prompts", "stats.winrate", "stats.length", "stats.ranking", "stats.agreement",
            "stats.tables", "stats.seeds", "stats.side_by_side", "stats.papers", "stats.plots", "stats.report",
            "data.notebook", "stats.run_report", "stats.run_traces", "stats.traces", "exercises.show", "exercises.plot",
            "data", "data.run_folders", "data.judges.person", "data.judges.pools", "data.sets", "data.alpaca_eval",
            "data.arena_hard", "data.attacks", "data.families", "data.hub", "data.template", "data.barn",
            "data.barn.world", "data.barn.reward", "data.barn.judge", "data.barn.lexicon")


def files():
    """Every file of the project, from its root: what git tracks or would add."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, timeout=60)
    if listed.returncode:                               # a downloaded copy without git's folder
        made = {"runs", "__pycache__"}
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        return [path for path in paths if not made & set(path.parts)
                and not any(part.startswith(".") for part in path.parts)]
    return [path for path in map(Path, listed.stdout.splitlines()) if (ROOT / path).exists()]


SOURCES = sorted(path for path in files() if path.suffix == ".py" and "tests" not in path.parts)
every_source = pytest.mark.parametrize("path", SOURCES, ids=str)
METHODS = [path for path in SOURCES if path.parent.name == "rlhf" and path.stem in methods()]


def imports(path):
    """[(module, at the top level of the file?)] of all that a file imports; ours down to the module."""
    tree = ast.parse((ROOT / path).read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in inner]
        else:
            continue
        found += [(name, node in tree.body) for name in names]
    return found


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def part(module):
    """Which part of the house a module of ours is: what may be imported is said of parts."""
    top, _, rest = module.partition(".")
    if module in ("farm", "data.barn.pretrain", "serve", "benchmarks.__main__", "rlhf.reward_bench", "exercises.blank",
                  "exercises.grade"):
        return "command"                                # nothing imports a command
    if top == "rlhf":
        return "stage" if rest in STAGES else "method" if rest in methods() else "kit"
    return "study" if top == "studies" and rest in studies() else top


FLOORS = ({"data", "stats"}, {"model", "mixture", "products", "annotate"}, {"kit", "stage", "method", "eval"},
          {"command", "benchmarks", "study", "studies", "exercises"})
MAY_IMPORT = {                          # on one floor; whatever is on a lower one may be imported, too
    "data": {"data"}, "stats": {"stats", "data"},
    "model": {"mixture", "products"}, "mixture": set(), "products": set(), "annotate": set(),
    "kit": {"kit"}, "stage": {"kit", "stage"}, "method": {"kit", "stage", "method", "eval"}, "eval": set(),
    "benchmarks": {"benchmarks"}, "study": {"studies"}, "studies": {"studies"}, "exercises": {"exercises"},
    "command": {"benchmarks", "studies", "exercises"},
}


def module_of(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@every_source
def test_imports_point_down(path):
    ours = {name for name, _ in imports(path) if name.partition(".")[0] in OURS}
    mine = part(module_of(path))
    floor = next(n for n, parts in enumerate(FLOORS) if mine in parts)
    allowed = MAY_IMPORT[mine].union(*FLOORS[:floor])
    above = sorted(name for name in ours if part(name) not in allowed)
    assert not above, f"{path} imports what is built on it: {above}"


def test_no_two_files_import_each_other():
    """Nor any longer circle: files can be put into an order in which each imports only those before it."""
    left = {module_of(path): {name for name, _ in imports(path)} for path in SOURCES}
    while ready := [module for module, needed in left.items() if not needed & left.keys() - {module}]:
        for module in ready:
            del left[module]
    assert not left, f"a circle among {sorted(left)}"


def test_a_method_is_built_on_another_one_only_openly():
    for path in METHODS:
        needed = {name for name, _ in imports(path) if part(name) == "method" and name != module_of(path)}
        opened = (ROOT / path).read_text().split("@dataclass")[0]           # at the top, where a reader looks
        for name in needed:
            module = name.removeprefix("rlhf.")
            assert re.search(rf"^(from|import) .*\b{module}\b", opened, re.MULTILINE), path


@every_source
def test_only_the_standard_library_and_four_packages(path):
    for name, at_the_top in imports(path):
        package = name.partition(".")[0]
        assert name != "torch.utils.tensorboard" or not at_the_top, path        # may not be installed
        lazily = not at_the_top and (package in PEERS and path == Path("benchmarks/peers.py")
                                      or package == "google" and path == Path("data/notebook.py"))    # Colab has it
        templates = package == "jinja2" and path == Path("data/sandbox.py")     # torch needs it anyway
        assert package in sys.stdlib_module_names | PACKAGES | OURS or lazily or templates, f"{path} imports {name}"


def test_judges_statistics_and_the_world_do_without_torch():
    assert all(map(is_module, NO_TORCH))
    heavy = {"torch", "tokenizers", "rlhf", "model"}
    code = f"import {', '.join(NO_TORCH)}, sys; print(*{heavy} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) == ("", "")


NOT_ON_WINDOWS = {
    "sys.modules": "curses fcntl grp posix pty pwd readline resource syslog termios tty",
    "os": "chown fchmod fork getegid geteuid getgid getloadavg getpgid getpgrp getuid killpg mkfifo nice pread pwrite "
          "sched_getaffinity sched_setaffinity setpgid setsid statvfs sysconf uname O_NONBLOCK O_NOFOLLOW O_DIRECTORY",
    "signal": "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 alarm pause setitimer pthread_sigmask",
    "select": "epoll poll", "socket": "AF_UNIX", "time": "tzset", "mmap": "MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE"}
ELSEWHERE = f"""
import importlib, mmap, os, select, signal, socket, sys, time
theirs, ours = sys.argv[1].split(), sys.argv[2].split()
for name in theirs:
    importlib.import_module(name)                       # these know the system that they are on
for owner, names in {NOT_ON_WINDOWS}.items():
    for name in names.split():
        if owner == "sys.modules":
            sys.modules[name] = None
        elif hasattr(globals()[owner], name):
            delattr(globals()[owner], name)
for name in ours:
    importlib.import_module(name)
"""


@pytest.mark.slow
def test_everything_is_imported_where_there_is_no_posix():
    theirs = {name for path in SOURCES for name, at_the_top in imports(path) if at_the_top}
    theirs -= {name for name in theirs if name.partition(".")[0] in OURS}
    ours = [module_of(path) for path in SOURCES if path.name != "__main__.py"]
    line = [sys.executable, "-c", ELSEWHERE, " ".join(sorted(theirs)), " ".join(ours)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@every_source
def test_every_file_says_in_one_line_what_it_is(path):
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    assert docstring and docstring.splitlines()[0].endswith((".", ":", "?")), path
    if path.parent.name == "rlhf" and path.stem not in (*methods(), "__init__"):
        assert docstring.startswith("[kit]")


@pytest.mark.parametrize("path", METHODS, ids=str)
def test_a_method_has_its_three_parts(path):
    module = importlib.import_module(module_of(path))
    assert isinstance(module.NEEDS, tuple) and set(module.NEEDS) <= set(methods()) - {path.stem}
    assert is_dataclass(module.Config) and issubclass(module.Config, config.Config)
    assert callable(module.run)


@pytest.mark.parametrize("path", sorted(path for path in files() if path.suffix == ".py"), ids=str)
def test_files_are_short_and_so_are_their_lines(path):
    lines = (ROOT / path).read_text().splitlines()
    most = {"model.py": 700, "eval.py": 480}.get(str(path), 450)
    assert len(lines) <= most or path.parts[0] == "tests", f"{path}: {len(lines)} lines, the design is wrong"
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 120 or line != line.rstrip()]
    assert (ROOT / path).read_text().endswith("\n")


def text_files():
    for path in files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data and path.name not in ("tokenizer.json", "LICENSE"):
            yield path, data.decode()


def test_nothing_is_left_to_do_and_no_file_knows_the_machine_it_was_written_on():
    unfinished = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b")
    machine = re.compile(r"(?<![\w.])/(work|tmp|root|home|mnt|Users)/")
    found = {str(path): match[0] for path, text in text_files() for match in unfinished.finditer(text)}
    found |= {str(path): match[0] for path, text in text_files() for match in machine.finditer(text)}
    assert not found


def test_the_map_in_the_readme_lists_exactly_the_files_that_exist():
    """Form: the fenced block that begins with farm.py; a line is a path from the root, two spaces or more,
    and what it is. A path that ends in / is all below it; every .py file but __init__.py is there once."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```\w*\n(farm\.py  .*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1, "README.md has one map, a fenced block whose first line is about farm.py"
    mapped = [re.fullmatch(r"(\S+) {2,}\S.*", line) for line in blocks[0].splitlines()]
    assert all(mapped), [line for line, match in zip(blocks[0].splitlines(), mapped) if not match]
    paths = [match[1] for match in mapped]
    assert len(paths) == len(set(paths))
    assert not [path for path in paths if not (ROOT / path).exists()]
    folders = tuple(path for path in paths if path.endswith("/"))
    code = {str(path) for path in files() if path.suffix == ".py" and path.name != "__init__.py"}
    listed = {path for path in paths if path.endswith(".py")}
    assert {path for path in code - listed if not path.startswith(folders)} == set() == listed - code


def test_the_lines_and_the_tests_that_the_readme_names_are_there():
    """Counts of lines may be off by five, so that not every edit is one of README, too."""
    text = " ".join((ROOT / "README.md").read_text().split())
    counts = re.findall(r"`((?:rlhf/)?\w+\.py)` (?:\| |\()(\d+)(?: \||\))", text)
    assert {f"rlhf/{name}.py" for name in methods()} <= {path for path, _ in counts} and ("model.py" in dict(counts))
    for path, said in counts:
        assert abs(len((ROOT / path).read_text().splitlines()) - int(said)) <= 5, path
    named = re.findall(r"`tests/(test_\w+\.py)::(\w+)`", text)
    assert len(named) >= 10
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), test


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_four_packages_with_lower_bounds_and_nothing_else():
    wanted = [re.fullmatch(r"([\w-]+)>=\d+(\.\d+)*", line) for line in requirements("requirements.txt")]
    assert all(wanted) and sorted(match[1] for match in wanted) == sorted(PACKAGES)
    assert requirements("requirements-dev.txt")[0] == "-r requirements.txt"


PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.mark.parametrize("python", PYTHONS)
def test_what_was_tested_is_pinned_once_for_each_python_and_fits_the_bounds(python):
    pins = [Requirement(line) for line in requirements("constraints.txt")]
    valid = [pin for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": python})]
    pinned = {pin.name: re.fullmatch(r"==([\d.]+)", str(pin.specifier))[1] for pin in valid}
    assert len(pinned) == len(valid), "a package is pinned twice"
    for line in (*requirements("requirements.txt"), *requirements("requirements-dev.txt")[1:]):
        wanted = Requirement(line)
        assert wanted.specifier.contains(pinned[wanted.name]), line


def test_every_package_that_a_test_imports_is_required():
    """Named in an import or in pytest.importorskip; what the tests import of each other and of us is no package."""
    paths = [path for path in files() if path.suffix == ".py" and path.parts[0] == "tests"]
    own = OURS | {part for path in paths for part in path.with_suffix("").parts}
    skipped = {name.partition(".")[0] for path in paths
               for name in re.findall(r'importorskip\("([\w.]+)"\)', (ROOT / path).read_text())}
    imported = {name.partition(".")[0] for path in paths for name, _ in imports(path)}
    required = {Requirement(line).name for file in ("requirements.txt", "requirements-dev.txt")
                for line in requirements(file) if not line.startswith("-r")}
    assert (imported | skipped) - own - sys.stdlib_module_names - {"packaging"} <= required


def lasting(node):
    """Does this piece of a test wait for something that may never come?"""
    if isinstance(node, ast.While):
        return isinstance(node.body[0], ast.Pass)
    if not isinstance(node, ast.Call):
        return False
    owner, _, name = ast.unparse(node.func).rpartition(".")
    given = {keyword.arg for keyword in node.keywords}
    asks = owner in ("subprocess", "requests", "session") and name not in ("Popen", "Session")
    if asks or name in ("communicate", "urlopen"):
        return "timeout" not in given
    if name in ("wait", "join", "get", "result", "acquire"):
        return not node.args and not given
    if name == "create_connection":
        return len(node.args) < 2 and "timeout" not in given
    return name == "Thread" and "daemon" not in given


@pytest.mark.parametrize("path", sorted(path for path in files() if path.match("tests/*.py")), ids=str)
def test_no_test_waits_for_ever(path):
    """A child, a server or a thread that hangs fails its test. Processes that are sent signals are commands.child."""
    tree = ast.parse((ROOT / path).read_text())
    assert not [f"{path}:{node.lineno}" for node in ast.walk(tree) if lasting(node)]


@pytest.mark.parametrize("line, hangs", [
    ("subprocess.run(['x'])", True), ("subprocess.run(['x'], timeout=9)", False), ("process.communicate()", True),
    ("event.wait()", True), ("event.wait(5)", False), ("thread.join()", True), ("', '.join(words)", False),
    ("requests.get(url)", True), ("requests.get(url, timeout=9)", False), ("while busy(): pass", True),
    ("threading.Thread(target=f)", True), ("socket.create_connection(('h', 1))", True), ("numbers.get(key)", False)])
def test_waits_without_a_limit_are_recognised(line, hangs):
    assert any(lasting(node) for node in ast.walk(ast.parse(line))) == hangs


def test_every_judge_s_prompt_has_a_place_for_all_that_it_compares():
    names = {path.stem for path in files() if path.match("data/judges/*.json")} - {"annotators", "prices"}
    assert names == {annotator.prompt for annotator in paper_pool(["m"])} | {"pairwise", single("m")[0].prompt}
    for name in names:
        form = template(name)
        assert form["verdict"] in READERS and form["messages"][-1]["content"].count("{pairs}") == 1
        assert all(f"{{{place}}}" in form["pair"] for place in ("instruction", "output_1", "output_2", "fence"))
        assert ("{n}" in form["pair"]) == (form["verdict"] != "letter")
