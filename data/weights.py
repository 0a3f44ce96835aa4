"""Weights on disk: safetensors by hand, Hugging Face folders and PEFT folders.

A safetensors file is eight bytes of header length, a JSON header that names every tensor, and the tensors'
bytes, end to end (https://github.com/huggingface/safetensors, "Format"). Nothing in it is trusted: `_layout`
holds every rule, and the writer asks it too. Left out: writing shards, quantised formats, and pickles (.bin,
.pt), which run code when they are opened.
"""
import itertools
import json
import math
import os
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

from data import InputError

# In the order in which the official library sorts the tensors of a file, so that both write the same bytes.
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}                         # older transformers load nothing without it
MAX_HEADER = 100_000_000                            # bytes, as in the official library

# What turns up under the name of a weights file, told by its first bytes.
STRANGERS = {
    rb"version https://git-lfs": "a Git LFS pointer, not the weights: `git lfs pull` brings the file itself",
    rb"\s*<[!?hH]": "a web page, not the weights: the download met a login or error page, so repeat it",
    rb"GGUF": "a GGUF file: only safetensors is read here, and most models have a repository with it",
    rb"PK\x03\x04": "a zip, as torch.save writes: the pickle inside can run code, so it is never loaded; "
                    "take the safetensors version of the model",
    rb"\x80[\x02-\x05][^\x00]": "a pickle: it can run code, so it is never loaded; "
                                "take the safetensors version of the model",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "generation_config.json", "chat_template.jinja")
# PEFT options, and the values that make an adapter lora_alpha / r * B @ A on top of an unchanged base model.
PLAIN_LORA = {
    "peft_type": ("LORA",), "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),     # pissa, olora, ... move the base
    **dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "rank_pattern", "alpha_pattern",
                     "modules_to_save", "layer_replication", "alora_invocation_tokens"),
                    (None, False, [], {})),
}


class WeightsError(InputError):
    """Weights that cannot be used: one sentence with the file, the tensor and the broken rule."""


# ---------------------------------------------------------------------------------------------------------
# safetensors

def read_safetensors(path):
    """(tensors by name, metadata) of one file. Each tensor owns its memory: no more than the file in all.

    Raises WeightsError for a malformed file, before any of that memory is asked for."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if length > min(MAX_HEADER, size - 8) or start[8:9] != b"{":
            # Asked only now: a good file with a header of 640 bytes begins like a pickle.
            for signature, kind in STRANGERS.items():
                if re.match(signature, start):
                    raise WeightsError(f"{path}: this is {kind}")
            raise WeightsError(f"{path}: not a safetensors file, or one cut short: its {size} bytes do not "
                               "begin with the length of a header and the header's {")
        file.seek(8)
        metadata, layout = _layout(path, file.read(length), size - 8 - length)
        tensors = {}
        for name, dtype, shape in layout:
            tensors[name] = torch.empty(shape, dtype=dtype)
            buffer = _bytes(tensors[name])
            if file.readinto(buffer) != len(buffer):
                raise WeightsError(f"{path}: the file shrank while tensor {name!r:.99} was read")
    return tensors, metadata


def write_safetensors(path, tensors, metadata=METADATA):
    """Write one file, whole or not at all. The same tensors give the same bytes, in whatever order they come.

    Tied tensors are written once for each name: leave one out, as Hugging Face does."""
    strange = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items()
               if tensor.dtype not in DTYPE_NAMES]
    if strange:
        raise WeightsError(f"{path}: safetensors has no dtype for {', '.join(strange)}")
    rank = {dtype: place for place, dtype in enumerate(DTYPE_NAMES)}
    tensors = dict(sorted(tensors.items(), key=lambda item: (rank[item[1].dtype], item[0])))
    table, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                       "data_offsets": [begin, end]}
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)             # whoever maps the file finds its data aligned
    _layout(path, header, end)                      # what is refused when read is refused when written
    data = (_bytes(tensor.detach().cpu()) for tensor in tensors.values())
    _write(path, itertools.chain([len(header).to_bytes(8, "little"), header], data))


def _layout(path, header, room):
    """Check a header against `room` bytes of data: metadata, and (name, dtype, shape) in the data's order."""
    def rule(holds, sentence):
        if not holds:
            raise WeightsError(f"{path}: {sentence}")

    rule(len(header) <= MAX_HEADER, f"the header has {len(header)} bytes, more than {MAX_HEADER}")
    table = _json(path, header)
    metadata = table.pop("__metadata__", {})
    rule(isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()),
         "__metadata__ must map strings to strings")
    entries = []
    for name, info in table.items():
        which = f"tensor {name!r:.99}"
        rule(isinstance(info, dict) and info.keys() == {"dtype", "shape", "data_offsets"},
             f"{which} must have dtype, shape and data_offsets, and nothing else")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        rule(isinstance(dtype, str) and dtype in DTYPES, f"{which} has the unknown dtype {dtype!r:.99}")
        # 64 dimensions are all that torch's operators take, and a product of a million numbers never ends.
        # Beside a 0 any size needs no bytes, but torch still multiplies the others into strides.
        rule(_whole(shape) and len(shape) <= 64 and math.prod(max(size, 1) for size in shape) < 2**63,
             f"{which} has the impossible shape {shape!r:.99}")
        rule(_whole(offsets) and len(offsets) == 2, f"{which} has impossible data_offsets {offsets!r:.99}")
        (begin, end), need = offsets, math.prod(shape) * DTYPES[dtype].itemsize
        rule(end - begin == need, f"{which} of {dtype} {shape} needs {need} bytes, not offsets {offsets}")
        entries.append((begin, end, name, DTYPES[dtype], shape))
    entries.sort(key=lambda entry: entry[:2])
    position = 0
    for begin, end, name, *_ in entries:
        # Overlaps could claim far more memory than the file has bytes; a gap could hide another file.
        rule(begin == position, f"tensor {name!r:.99} begins at byte {begin} of the data, not at {position}: "
                                "an overlap or a gap")
        position = end
    rule(position == room, f"its tensors end at byte {position} of the data and the file at {room}: "
                           "cut short, or something was added")
    return metadata, [entry[2:] for entry in entries]


def _whole(numbers):
    """Is this a list of integers from 0 up? True and 1.0 are none, although they equal 1."""
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _json(path, data):
    """The JSON object in these bytes, read as strictly as the official library does, and no key twice."""
    def unique(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]!r:.99} is there twice")
        return dict(pairs)

    try:
        table = json.loads(data.decode(), object_pairs_hook=unique)
        json.dumps(table, ensure_ascii=False).encode()      # half of a surrogate pair loads, but is no text
        if not isinstance(table, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its JSON is malformed: {error}") from None
    return table


def _bytes(tensor):
    """A CPU tensor's bytes, row by row, as a flat array: its own memory if contiguous, else a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _write(path, chunks):
    """Write under another name, and rename once it is safe on disk: a crash leaves the older file whole."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temp, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------
# Hugging Face folders

def load_weights(folder):
    """All tensors of a checkpoint folder by name: model.safetensors, or the shards that its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")[0]
    if not index.exists():
        raise _absent(folder, "model.safetensors")
    places = _json(index, index.read_bytes()).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index}: its weight_map must map the tensors to files")
    for shard in places.values():                   # from a download: it must not lead out of the folder
        if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", shard):
            raise WeightsError(f"{index}: {shard!r:.99} is not the plain name of a safetensors file")
    tensors, missing = {}, []
    for shard in sorted(set(places.values())):
        if not (folder / shard).exists():
            missing.append(f"the file {shard}")
            continue
        held = read_safetensors(folder / shard)[0]
        names = [name for name, place in places.items() if place == shard]
        tensors.update((name, held[name]) for name in names if name in held)
        missing += [f"{name} in {shard}" for name in names if name not in held]
    if missing:
        raise WeightsError(f"{index}: named there, but missing: {', '.join(missing)}")
    return tensors


@torch.no_grad()
def assign(module_state, loaded, where):
    """Copy each loaded tensor into the tensor of that name in `module_state`, in place and cast to its dtype.

    Strict: before any copy, one WeightsError lists all that are missing, unexpected, misshaped or not finite.
    `where`, the file or folder they came from, opens its message."""
    shared = [name for name in module_state if name in loaded]
    faults = {
        "missing": [name for name in module_state if name not in loaded],
        "unexpected": [name for name in loaded if name not in module_state],
        "misshaped": [f"{name} (is {list(loaded[name].shape)}, should be {list(module_state[name].shape)})"
                      for name in shared if loaded[name].shape != module_state[name].shape],
        "not finite": [f"{name} (as {module_state[name].dtype})"
                       for name in shared if not _finite(loaded[name], module_state[name].dtype)],
    }
    if any(faults.values()):
        lists = [f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names]
        raise WeightsError(f"{where}: these tensors do not fit the model; {'; '.join(lists)}")
    for name in shared:
        module_state[name].copy_(loaded[name])


def _finite(tensor, dtype):
    """Is every value finite, also once it is cast to `dtype`? The extremes tell, for NaN spreads to them.

    isfinite on the tensor itself would take several times its memory, and casting it as much again."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()                     # torch has no aminmax for float8
    return all(bound.to(dtype).isfinite() for bound in tensor.aminmax())


def save_pretrained(folder, tensors, config, tokenizer_from):
    """Write a folder that transformers loads: config.json, model.safetensors, and whichever TOKENIZER_FILES
    the folder `tokenizer_from` holds, byte for byte. A model folder in its place is replaced as a whole."""
    with _new_folder(folder) as temp:
        _write(temp / "config.json", [json.dumps(config, indent=2).encode() + b"\n"])
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_from) / name).exists():
                _write(temp / name, [(Path(tokenizer_from) / name).read_bytes()])
        write_safetensors(temp / "model.safetensors", tensors)


@contextmanager
def _new_folder(folder):
    """A temporary folder beside `folder`: takes its place when complete, and vanishes on an error."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not any(folder.glob("*.safetensors")):
        raise WeightsError(f"{folder}: holds files, but no weights to replace; name another folder")
    temp, old = (folder.with_name(f".{folder.name}.{state}-{os.getpid()}") for state in ("tmp", "old"))
    shutil.rmtree(temp, ignore_errors=True)         # of a killed run that happened to have our process id
    temp.mkdir(parents=True)
    try:
        yield temp
        if folder.exists():
            # No call swaps two folders: killed between the renames, both are there, whole but hidden.
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(temp, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)


def _absent(folder, wanted):
    """The error for a folder without `wanted`; if it has pickles instead, with why they are left alone."""
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    advice = (f", only {', '.join(pickles)}: a pickle can run code, so it is never loaded; name a revision "
              "of the model that has safetensors, or convert it once with transformers' from_pretrained and "
              "save_pretrained") if pickles else ""
    return WeightsError(f"{folder}: there is no {wanted} here{advice}")


# ---------------------------------------------------------------------------------------------------------
# PEFT folders

def save_adapter(folder, tensors, rank, alpha, target_modules, base):
    """Write LoRA tensors, `<module path>.lora_A` (rank, in) and `<module path>.lora_B` (out, rank), as a
    folder that PEFT loads onto the model `base`. An adapter folder in its place is replaced as a whole."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": alpha, "target_modules": sorted(target_modules), "lora_dropout": 0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "modules_to_save": None,
    }
    with _new_folder(folder) as temp:
        _write(temp / "adapter_config.json", [json.dumps(config, indent=2).encode() + b"\n"])
        write_safetensors(temp / "adapter_model.safetensors",
                          {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()})


def load_adapter(folder):
    """(tensors, adapter_config) of a PEFT folder, with the names and shapes that save_adapter takes.

    Plain LoRA only: one WeightsError lists every option and every tensor that is something else."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).exists():
            raise _absent(folder, name)
    config = _json(folder / "adapter_config.json", (folder / "adapter_config.json").read_bytes())
    faults = [f"{key} = {config.get(key)!r:.99}" for key, plain in PLAIN_LORA.items()
              if config.get(key) not in plain]
    faults += [f"{key} = {config.get(key)!r:.99}" for key in ("r", "lora_alpha")
               if type(config.get(key)) not in (int, float)]
    tensors, other = {}, {"A": "B", "B": "A"}
    for key, tensor in read_safetensors(folder / "adapter_model.safetensors")[0].items():
        match = re.fullmatch(r"base_model\.model\.(.+\.lora_([AB]))\.weight", key)
        if match and tensor.dim() == 2 and tensor.shape["AB".index(match[2])] == config.get("r"):
            tensors[match[1]] = tensor
        else:
            faults.append(f"{key} {list(tensor.shape)}")
    faults += [f"{name} without its lora_{other[name[-1]]}" for name in tensors
               if name[:-1] + other[name[-1]] not in tensors]
    if faults:
        raise WeightsError(f"{folder}: not a plain LoRA adapter of one rank: {', '.join(faults)}")
    return tensors, config
