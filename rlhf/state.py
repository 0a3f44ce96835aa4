"""[kit] A state on disk: tensors as safetensors, numbers, texts, lists and dicts as JSON, and never a pickle."""
import json
import os
import random
import shutil
from types import SimpleNamespace

import numpy
import torch

from data.files import hash_of, sync_folder, write_json, write_whole
from data.weights import read_safetensors, write_safetensors

TENSORS, REST, MANIFEST = "state.safetensors", "state.json", "MANIFEST.json"


class Kept(SimpleNamespace):
    """Variables of a loop that a save must contain: numbers, texts, tensors, and lists and dicts of these."""

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


def without_tensors(value, tensors):
    """The value for JSON: each tensor is appended to `tensors` and replaced by {"tensor": its index there}."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {key: without_tensors(each, tensors) for key, each in value.items()}
    return [without_tensors(each, tensors) for each in value] if isinstance(value, (list, tuple)) else value


def with_tensors(value, tensors):
    """The inverse of without_tensors(), except that tuples have become lists. tensors: {index as text: tensor}."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[str(value["tensor"])]
        return {key: with_tensors(each, tensors) for key, each in value.items()}
    return [with_tensors(each, tensors) for each in value] if isinstance(value, list) else value


def randomness():
    """The states of the process's global random generators: torch, CUDA, Python and numpy. A user's method may use
    them; ours do not: they seed generators of their own from --seed and the step."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    _, keys, at, has_gauss, gauss = numpy.random.get_state()
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(),
            "numpy": [keys.tolist(), at, has_gauss, gauss]}


def set_randomness(state):
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy.random.set_state(("MT19937", *state["numpy"]))


def write(folder, state):
    """Write a state to a folder: the folder is there as a whole, or not at all."""
    part, tensors = folder.with_name(f".{folder.name}.tmp-{os.getpid()}"), []
    rest = without_tensors(state, tensors)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_safetensors(part / TENSORS, {str(i): tensor for i, tensor in enumerate(tensors)})
        write_whole(part / REST, [json.dumps(rest).encode()])
        write_json(part / MANIFEST, {name: hash_of(part / name) for name in (TENSORS, REST)})
        part.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read(folder):
    """The state in a folder; None if a file is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest != {name: hash_of(folder / name) for name in (TENSORS, REST)}:
            return None
        return with_tensors(json.loads((folder / REST).read_text()), read_safetensors(folder / TENSORS)[0])
    except (OSError, ValueError):
        return None
