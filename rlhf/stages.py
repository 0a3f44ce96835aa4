"""[kit] Stages: when a finished one is reused, when it is refused, and how it is run again.

A stage is reused only if everything that made it is the same: its settings, the stages it needed, the content of its
data and of its base model, and the source code of its method. All of this is in its config.json; `id` is a hash of it.
A stage that is run again is made in a folder beside the old one (dpo.new). When it is finished, the old folder is
renamed (.dpo.old), the new one gets its name, and the old one is deleted, so that a kill at any moment leaves one of
the two complete. A lock lets one process at a time work on a stage. An interrupted stage goes on from its saves, see
saves.py.
"""
import ast
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import textwrap
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from data import InputError, read_json, run_folders
from data.files import alone, hash_of, remove_temporary, sync_folder, write_json
from data.progress import Progress, cut, fitted, width
from data.text import TODAY
from rlhf import DECODER, FOLDER, config, memory
from rlhf.saves import SAVES, Saves, seconds_saved
from rlhf.update import NotFinite

BAD = "bad_batch.json"                  # what a run was about when a number was not finite
LOGS = {"config.json", "metrics.jsonl", "samples.jsonl", BAD}       # an unfinished stage with only these is overwritten
LITTLE = 60                             # and may have saved the work of so many seconds
SMALL = 10_000_000                      # bytes of a file up to which damage is found by its hash, too
SEEN = {}                               # {file: hash of its source when this process first read it}


# -- what makes a stage --------------------------------------------------------------------------------------------

def digest(document):
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def records_of(cfg):
    """Hashes of a run's records. Of the eval split only the questions count, since answers are judged in every run."""
    splits = cfg.splits()
    asked = [[record["instruction"], record["input"]] for record in splits.pop("eval")]
    return {"data": digest(splits), "eval_data": digest(asked)}


def files_of(folder):
    """A hash of the names, the sizes, and the first and last MB of the files in a folder."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        with open(path, "rb") as file:
            ends = hashlib.sha256(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            ends.update(file.read())
        found.append([path.name, size, ends.hexdigest()])
    return digest(found)


def checkpoint_of(folder):
    """What identifies a checkpoint: the name of a folder from the hub, which is its commit, or a hash of its files."""
    return folder.name if config.in_cache(folder) else files_of(folder.absolute())


def base_of(cfg):
    """A hash of the model that a run starts from."""
    folders = [cfg.checkpoint, cfg.adapter] if cfg.adapter else [cfg.checkpoint]
    return digest([checkpoint_of(folder) for folder in folders])


def canonical(node):
    """A syntax tree as nested lists, without docstrings and without empty fields, which differ between versions of
    Python. A syntax tree has no comments."""
    if isinstance(node, list):
        return [canonical(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    children = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
        children["body"] = children["body"][1:]
    return [type(node).__name__, *([name, canonical(value)] for name, value in children.items()
                                   if value is not None and value != [])]


@lru_cache(None)
def hash_and_imports(source):
    """(hash of a source text without comments and docstrings, the modules that it imports)."""
    tree = ast.parse(source)
    return digest(canonical(tree)), list(imported(tree))


def imported(tree):
    """The modules that a file imports, anywhere in it. Of `from a import b` both a and a.b, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["rlhf" if node.level else "", node.module]))
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def sources(method):
    """{file: hash} of a method's source and of all it imports from rlhf/ and DECODER, directly or not."""
    left, found = [f"rlhf.{method}"], {}
    while left:
        file = f"{left.pop().replace('.', '/')}.py"
        path = FOLDER.parent / file
        if file in found or not file.startswith(("rlhf/", *DECODER)) or not path.exists():
            continue
        found[file], further = hash_and_imports(path.read_text(encoding="utf-8"))
        if SEEN.setdefault(path, found[file]) != found[file]:
            raise InputError(f"{file} has changed since Python loaded it: restart Python to run the new code")
        left += further
    return dict(sorted(found.items()))


@dataclass
class Stage:
    """A method with its settings, in a run folder."""
    module: ModuleType
    cfg: config.Config
    needs: dict                         # {method: id} of the stages that it needs
    contents: dict                      # {what: hash} of the records
    dotted: str                         # "pairs." if its flags are --pairs.flip and so on, "" if they are --flip

    def __post_init__(self):
        self.method, self.name = self.module.__name__.rpartition(".")[2], self.cfg.stage
        self.folder = Path(self.cfg.out) / self.name
        self.cfg.day = first_day(Path(self.cfg.out))
        unused = self.cfg.idle().keys() | (set() if self.cfg.asks_judge else {"judge", "pool"} | config.ASKED)
        settings = asdict(self.cfg)
        self.settings = {key: settings[key] for key in settings if key not in config.ELSEWHERE | unused}
        reads = {what: checkpoint_of(content) if isinstance(content, Path) else digest(content)
                 for what, content in self.cfg.reads().items()}
        self.contents = {**self.contents, "model": base_of(self.cfg), **reads}
        self.made = {"method": self.method, "needs": self.needs, "contents": self.contents,
                     "sources": sources(self.method)}
        self.id = digest([self.settings, self.made])

    def flag(self, key, value):
        """The flag that gives a setting this value."""
        dotted = "" if key in config.WHOLE_RUN else self.dotted
        return f"--{dotted}{'' if value else 'no_'}{key}" if isinstance(value, bool) else f"--{dotted}{key} {value}"


# -- what is in its folder -----------------------------------------------------------------------------------------

class Found(NamedTuple):
    """The state of a stage's folder."""
    there: dict                         # its config.json
    finished: bool
    damage: str                         # a sentence about the first missing or damaged file, or ""


def find(folder):
    """The Found of a folder; None if there is nothing in it. InputError if the folder is not one of a stage."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose another --name or --out")
    finished = (folder / "result.json").exists()
    if not (folder / "config.json").exists() and not finished and only_logs(folder):
        return None                     # no folder, or one from before a kill that has nothing in it
    try:
        there, result = run_folders.config_of(folder), run_folders.result_of(folder)
    except InputError as error:
        return Found({}, finished, str(error))
    if not there and finished:
        return Found({}, finished, f"{folder / 'config.json'} is missing")
    if not {"id", "needs"} <= there.keys():
        raise InputError(f"{folder} is not a stage of a run: choose another --out")
    return Found(there, finished, damaged(folder, result) if finished else unreadable(folder))


def damaged(folder, result):
    """A sentence about the first file that is missing or not as it was when the stage was finished, according to its
    result.json. Logs may change."""
    hashes = result.get("hashes", {})
    for name, size in (result.get("files") or {}).items():
        if name in LOGS - {"config.json"}:
            continue
        if not (folder / name).exists():
            return f"{folder / name} is missing"
        if (now := (folder / name).stat().st_size) != size:
            return f"{folder / name} is damaged: {now} bytes instead of {size}"
        if name in hashes and hash_of(folder / name) != hashes[name]:
            return f"{folder / name} is damaged: its content has changed"
    return ""


def unreadable(folder):
    """A sentence about the first .json file of an unfinished stage that is not JSON."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return f"{path} is damaged: {error}"
    return ""


def files_in(folder):
    """{path below the folder: bytes}, without hidden files and folders, which may be half written."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path.stat().st_size for name, path in found.items()
            if not any(part.startswith(".") for part in name.parts)}


def only_logs(folder):
    return files_in(folder).keys() <= LOGS and seconds_saved(folder / SAVES)[0] < LITTLE


def hashes_in(folder, files):
    return {name: hash_of(folder / name) for name, size in files.items() if size <= SMALL and name not in LOGS}


def sync(folder):
    """Have all files in a folder written to the disk."""
    for name in files_in(folder):
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(path)


def first_day(out):
    """The day of a run's first stage, which chat templates get in all its stages; today for a new run. It is no part of
    a stage's id, so that a run can go on after midnight."""
    days = []
    for path in out.glob("*/config.json"):
        with contextlib.suppress(InputError):           # find() has a sentence about a damaged one
            days.append(run_folders.settings(path.parent).get("day") or TODAY)
    return min(days, default=TODAY)


class Difference(NamedTuple):
    text: str
    flag: str = ""                      # a flag that would make it the same
    short: str = ""                     # the difference in a word, for the name of a variant
    need: str = ""                      # the needed method whose stage was made again


def differences(stage, there):
    """[Difference] between what made the stage whose config.json is `there` and what would make it now."""
    if not {"sources", "contents", "revision"} <= there.keys():
        return [Difference("it was made by an older farm.py that did not record its source code")]
    cfg, files = stage.cfg, stage.made["sources"]
    changed = {key: value for key, value in stage.settings.items() if there.get(key) != value}
    found = [Difference(f"{key} is {there.get(key)!r} there and {value!r} here",
                        stage.flag(key, there[key]) if key in there else "", f"{key}{value}")
             for key, value in changed.items()]
    for what, content in stage.contents.items():
        if there["contents"].get(what) == content or changed.keys() & {what, "data", "limit"}:
            continue
        key = "revision" if what == "model" and there["revision"] != cfg.revision else what
        old, new = there.get(key), getattr(cfg, key, None)
        found.append(Difference(f"the content of --{what} has changed" if old == new
                                else f"{key} is {old!r} there and {new!r} here"))
    edited = [file for file in {**files, **there["sources"]} if files.get(file) != there["sources"].get(file)]
    if edited:
        found.append(Difference(f"{', '.join(edited)} {'has' if len(edited) == 1 else 'have'} changed since"))
    return found + [Difference(f"its {need} has been made again since", need=need)
                    for need, id in stage.needs.items() if there["needs"].get(need) != id]


def refusal(stage, what, different):
    """The InputError that says how a finished stage differs from the one that is wanted, and what to do about it."""
    flags = [each.flag for each in different]
    short = next((each.short for each in different if each.short), "2")
    beside = re.sub(r"[^\w.-]+", "_", f"{stage.name}_{short}", flags=re.ASCII)[:40]
    ways = [f"{' '.join(flags)} to use it"] if all(flags) else []
    ways += [f"--rerun {stage.name} to replace it", f"--{stage.dotted}name {beside} to make one beside it"]
    said = "; ".join(each.text for each in different)
    return InputError(f"{what} ({said}): give {', '.join(ways)}, or another --out")


# -- which stages have to run --------------------------------------------------------------------------------------

class Again:
    """The stages that --rerun names. They are also noted in the run folder, in the file .rerun: after an interruption
    the same command continues there, and does not start all of them again."""

    def __init__(self, out, ids):
        """ids: {method: id} of the stages that are named."""
        self.file, self.ids = Path(out) / ".rerun", ids
        try:
            before = read_json(self.file)
        except InputError:
            before = {}
        same = before.get("ids") == ids and isinstance(before.get("anew"), list)
        self.began = self.file.stat().st_mtime_ns if same else math.inf
        self.anew = set(before["anew"] if same else ids)        # methods that run again: named, or built on a named one

    def asks(self, stage):
        """Whether a stage is named and has not yet been finished by this command."""
        result = stage.folder / "result.json"
        return stage.method in self.ids and not (result.exists() and result.stat().st_mtime_ns > self.began)

    def begin(self):
        if self.ids and self.began == math.inf:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {"ids": self.ids, "anew": sorted(self.anew)})
            self.began = self.file.stat().st_mtime_ns

    def end(self):
        if self.ids:
            self.file.unlink(missing_ok=True)


def place(stage, again):
    """The folder in which a stage has to run; None if it can be reused. InputError if its folder holds a stage that was
    made otherwise, or the remains of one."""
    found = find(stage.folder)
    if found is None:
        return stage.folder
    different = differences(stage, found.there) if found.there else []
    rebuilt = different and all(each.need in again.anew for each in different)       # what it needs runs again
    if rebuilt or again.asks(stage) and (found.finished or found.damage or different):
        again.anew.add(stage.method)
        return beside(stage)
    if found.damage:
        raise InputError(f"{found.damage}; --rerun {stage.name} makes it again")
    if not different:
        return None if found.finished else stage.folder
    if found.finished:
        raise refusal(stage, f"{stage.folder} is finished and was made otherwise", different)
    if only_logs(stage.folder):
        return stage.folder
    raise refusal(stage, f"{stage.folder} is left from an interrupted run with other settings", different)


def beside(stage):
    """The folder in which a stage is made again while the old one is kept."""
    new, _ = new_and_old(stage.folder)
    found = find(new)
    if found and not found.finished and not only_logs(new):
        different = differences(stage, found.there) if found.there else []
        if found.damage or different:
            said = found.damage or "; ".join(each.text for each in different)
            raise InputError(f"{new} is left from an interrupted --rerun and cannot be continued ({said}): "
                             "give the settings that it was run with, or delete that folder")
    return new


def new_and_old(folder):
    """(folder of a stage while it is made again, folder of the old one while the two are exchanged)."""
    return folder.with_name(f"{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def settle(folder):
    """Put a finished new stage into the place of the old one, if there is one."""
    new, old = new_and_old(folder)
    if (new / "result.json").exists() and not find(new).damage:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    if old.exists() and not folder.exists():            # a kill came between the two renames
        old.rename(folder)
    elif old.is_symlink():
        old.unlink()
    elif old.exists():
        shutil.rmtree(old)


def not_default(stage):
    """The settings of a stage that are not the defaults, as text."""
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in config.changed(stage.cfg, stage.settings).items())


def run(stage, again, step):
    """Run a stage if it has to run, else print that it is reused. step: "stage 2 of 3"."""
    with alone(stage.folder):
        settle(stage.folder)
        folder = place(stage, again)
        if folder is None:
            changed = not_default(stage)
            print(cut(f"{stage.name}: reused" + f" ({changed})" * bool(changed), width()), flush=True)
            shutil.rmtree(stage.folder / SAVES, ignore_errors=True)     # a kill came right after result.json
            return
        print(f"{step}: {stage.name}{' again, beside the old one' * (folder != stage.folder)}")
        print(textwrap.fill(stage.module.__doc__.splitlines()[0], width(), initial_indent="  ",
                            subsequent_indent="  "), flush=True)
        with memory.watched(stage.cfg, stage.needs):
            make(stage, folder)
        settle(stage.folder)


def make(stage, folder):
    """Run a stage in this folder. result.json is written last: it marks a finished stage."""
    cfg = stage.cfg
    left = find(folder)
    if left and differences(stage, left.there):
        shutil.rmtree(folder)           # it holds only logs
    folder.mkdir(parents=True, exist_ok=True)
    changed = list(config.changed(cfg, stage.settings))
    write_json(folder / "config.json", {**config.provenance(cfg), **stage.made, "id": stage.id, "changed": changed})
    remove_temporary(folder)
    (folder / BAD).unlink(missing_ok=True)
    cfg.folders = {**cfg.folders, stage.name: folder.name}
    cfg.saves = Saves(folder / SAVES, cfg.save_minutes)
    metrics = work_of(stage, folder) or {}
    seconds, work = cfg.saves.seconds()
    cfg.folders, cfg.saves = {**cfg.folders, stage.name: stage.name}, Saves()
    sync(folder)
    files = files_in(folder)
    write_json(folder / "result.json", {"seconds": seconds, "cpu_seconds": work, "metrics": metrics, "files": files,
                                        "hashes": hashes_in(folder, files)})
    shutil.rmtree(folder / SAVES)
    shown = [f"{key.rpartition('/')[2]} {value:.4g}" for key, value in metrics.items()
             if isinstance(value, (int, float))]
    Progress.close()
    print(fitted([f"{stage.name}: done in {seconds:.0f} s", *shown[:3]]), flush=True)


def work_of(stage, folder):
    """What the method returns. If it meets a number that is not finite, the batch is left in the folder, for a look."""
    try:
        return stage.module.run(stage.cfg)
    except NotFinite as error:
        words = partial(stage.cfg.text().tokenizer.decode, skip_special_tokens=False)
        rows = [{"prompt": words(prompt), "response": words(response), "prompt_ids": prompt, "response_ids": response}
                for prompt, response in error.batch["rows"]]
        write_json(folder / BAD, {**error.batch, "rows": rows})
        raise FloatingPointError(f"{error}. The batch is in {folder / BAD}") from None


def finished(out):
    """([folder of each finished stage of a run], [a sentence about each that cannot be used])."""
    for old in Path(out).glob(".*.old"):                # a kill came during an exchange
        folder = old.with_name(old.name[1:-len(".old")])
        with alone(folder):
            settle(folder)
    whole, broken = [], []
    for result in sorted(Path(out).glob("*/result.json")):
        if result.parent.suffix == ".new":              # not yet exchanged
            continue
        try:
            damage = find(result.parent).damage
        except InputError as error:
            damage = str(error)
        if damage:
            broken.append(f"{damage}, so {result.parent.name} has no row: --rerun {result.parent.name}")
        else:
            whole.append(result.parent)
    return whole, broken
