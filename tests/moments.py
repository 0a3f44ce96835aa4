"""A stage of a tiny run, and what a kill would leave of it: its folder, copied at every moment at which it changes."""
import importlib
import json
import os
import shutil
from pathlib import Path

import toy

from rlhf import stages, update
from rlhf.saves import SAVES, saved, whole

CHANGES = [(os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree")]


class Killed(BaseException):
    """The process ends here: nothing catches it."""


def stage(folder, kind, method, save_minutes=0., **settings):
    """The Stage of a method in the run folder below `folder`, which saves after each step; its name ends in _new."""
    module = importlib.import_module(f"rlhf.{method}")
    cfg = toy.settings(folder, kind, module.Config, save_minutes=save_minutes, **settings)
    cfg.stage = f"{method}_new"
    return stages.Stage(module, cfg, {}, {}, "")


def make(one):
    """Run a stage as farm.py does. Returns how many optimizer steps it took."""
    taken, step = [], update.Updater.step
    update.Updater.step = lambda self: taken.append(self) or step(self)
    try:
        stages.run(one, stages.Again(one.cfg.out, {}), "stage 1 of 1")
    finally:
        update.Updater.step = step
    return len(taken)


def result(one):
    """{file: bytes} of a finished stage, with no time in it."""
    files = {path.relative_to(one.folder).as_posix(): path.read_bytes() for path in one.folder.rglob("*")
             if path.is_file()}
    said = json.loads(files.pop("result.json"))
    return {**files, "config.json": b"", "result.json": json.dumps([said["metrics"], said["hashes"]])}


def watch(one, patch, see):
    """Have see() called before every change to the folder of a stage."""
    busy = []

    def watched(change):
        def changing(*args, **kwargs):
            if not busy and one.folder.exists():
                busy.append(True)               # see() itself may change files
                try:
                    see()
                finally:
                    busy.pop()
            return change(*args, **kwargs)
        return changing
    for owner, name in CHANGES:
        patch.setattr(owner, name, watched(getattr(owner, name)))


def copies(one, monkeypatch, folder):
    """Run a stage, and copy its folder before every change to it; returns the copies and the steps it took."""
    found = []

    def see():
        found.append(folder / str(len(found)))
        shutil.copytree(one.folder, found[-1])
    with monkeypatch.context() as patch:
        watch(one, patch, see)
        return found, make(one)


def put_back(one, copy):
    """The folder of a stage as it was in a copy."""
    shutil.rmtree(one.folder)
    shutil.copytree(copy, one.folder)


def steps_saved(folder):
    """The optimizer steps in the newest whole save of a stage's folder, 0 if there is none. A save that is there but
    not whole is an error."""
    states = [whole(path) for path in saved(folder / SAVES)]
    assert None not in states, folder
    found = [state["taken"] for loop in (states[-1]["loops"] if states else ()) for state in loop["kept"]
             if isinstance(state, dict) and "taken" in state]
    return max(found, default=0)
