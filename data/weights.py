"""Weights on disk: safetensors by hand, and Hugging Face folders.

A safetensors file is eight bytes of header length, a JSON header that names every tensor, and the tensors' bytes, end
to end (https://github.com/huggingface/safetensors, "Format"). Nothing in it is trusted: `_layout` holds every rule, and
the writer asks it too. Tensors stay in the page cache until they are used, one at a time: memory never holds a second
copy of a model. Left out: quantised formats, and pickles (.bin, .pt), which run code when they are opened.
"""
import itertools
import json
import math
import mmap
import os
import re
import shutil
from collections import Counter, UserDict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from data import InputError
from data.hub import INDEX, SHARD

# In the order in which the official library sorts the tensors of a file, so that both write the same bytes.
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
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
    rb"PK\x03\x04": "a zip, as torch.save writes: its pickle can run code, so it is never loaded; take safetensors",
    rb"\x80[\x02-\x05][^\x00]": "a pickle: it can run code, so it is never loaded; take the model as safetensors",
}
WHOLE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
                   "added_tokens.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


class WeightsError(InputError):
    """Weights that cannot be used: one sentence with the file, the tensor and the broken rule."""


# -- safetensors -----------------------------------------------------------------------------------------------------

class Place(NamedTuple):
    """Where a tensor is: from byte `begin` of a file that had this `stamp` when its header was checked."""
    path: Path
    stamp: tuple
    begin: int
    dtype: torch.dtype
    shape: list

    def tensor(self):
        """The tensor, on pages of the file that are mapped for it and go with it; to write to it changes no file."""
        size = math.prod(self.shape) * self.dtype.itemsize
        if not size:
            return torch.empty(self.shape, dtype=self.dtype)        # there is no map of nothing
        before = self.begin % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            if _stamp(file) != self.stamp:              # to touch what was cut off would kill the process
                raise WeightsError(f"{self.path}: the file changed while it was being loaded")
            pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=self.begin - before)
        data = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=before)
        if before % self.dtype.itemsize:
            data = data.clone()                         # to an address that suits numbers of this size
        return data.view(self.dtype).view(self.shape)


class Mapped(UserDict):
    """Tensors by name, each mapped anew when it is looked up: who holds one at a time has one in memory, and one open
    file (a thousand may be more than a process is allowed).
    Behind it, in `data`, are the places by name: to delete or rename some touches no tensor."""

    def __getitem__(self, name):
        return self.data[name].tensor()


def read_safetensors(path):
    """(tensors by name, metadata) of one file. Each tensor owns its memory: no more than the file in all.
    Raises WeightsError for a malformed file, before any of that memory is asked for."""
    _, metadata, places = read_header(path)
    return {name: place.tensor().clone() for name, place in places.items()}, metadata


def write_safetensors(path, tensors, metadata=METADATA):
    """Write one file, whole or not at all. The same tensors give the same bytes, in whatever order they come.
    Tied tensors are written once for each name: leave one out, as Hugging Face does."""
    kinds = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    strange = [f"{name} ({dtype})" for name, (dtype, _) in kinds.items() if dtype not in DTYPE_NAMES]
    if strange:
        raise WeightsError(f"{path}: safetensors has no dtype for {', '.join(strange)}")
    rank = {dtype: place for place, dtype in enumerate(DTYPE_NAMES)}
    kinds = dict(sorted(kinds.items(), key=lambda item: (rank[item[1][0]], item[0])))
    table, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in kinds.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)             # whoever maps the file finds its data aligned
    _layout(path, header, end)                      # what is refused when read is refused when written
    data = (raw_bytes(tensors[name].detach().cpu()) for name in kinds)
    write_whole(path, itertools.chain([len(header).to_bytes(8, "little"), header], data))


def read_header(path):
    """(all bytes before the data, metadata, {name: Place} in the data's order) of one file, every rule checked."""
    with open(path, "rb") as file:
        stamp = size, _ = _stamp(file)
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if length > min(MAX_HEADER, size - 8) or start[8:9] != b"{":
            # Asked only now: a good file with a header of 640 bytes begins like a pickle.
            for signature, kind in STRANGERS.items():
                if re.match(signature, start):
                    raise WeightsError(f"{path}: this is {kind}")
            raise WeightsError(f"{path}: not a safetensors file, or cut short: its {size} bytes begin with no header")
        file.seek(0)
        head = file.read(8 + length)
    metadata, layout = _layout(path, head[8:], size - 8 - length)
    return head, metadata, {name: Place(path, stamp, len(head) + begin, dtype, shape)
                            for begin, _, name, dtype, shape in layout}


def _stamp(file):
    """Size and time of the last change: while they stay, the file fits its header."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _layout(path, header, room):
    """Hold a header against `room` bytes of data: metadata, and in its order [(begin, end, name, dtype, shape)]."""
    def rule(holds, sentence):
        if not holds:
            raise WeightsError(f"{path}: {sentence}")

    def whole(numbers):                             # True and 1.0 equal 1, but are none
        return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)

    rule(len(header) <= MAX_HEADER, f"the header has {len(header)} bytes, more than {MAX_HEADER}")
    table = parse_json(path, header)
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
        rule(whole(shape) and len(shape) <= 64 and math.prod(max(size, 1) for size in shape) < 2**63,
             f"{which} has the impossible shape {shape!r:.99}")
        rule(whole(offsets) and len(offsets) == 2, f"{which} has impossible data_offsets {offsets!r:.99}")
        (begin, end), need = offsets, math.prod(shape) * DTYPES[dtype].itemsize
        rule(end - begin == need, f"{which} of {dtype} {shape} needs {need} bytes, not offsets {offsets}")
        entries.append((begin, end, name, DTYPES[dtype], shape))
    entries.sort(key=lambda entry: entry[:2])
    position = 0
    for begin, end, name, *_ in entries:
        # Overlaps could claim far more memory than the file has bytes; a gap could hide another file.
        rule(begin == position, f"tensor {name!r:.99} begins at byte {begin}, not at {position}: an overlap or a gap")
        position = end
    rule(position == room, f"its tensors end at byte {position}, the file at {room}: cut short, or something was added")
    return metadata, entries


def parse_json(path, data):
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


def raw_bytes(tensor):
    """A CPU tensor's bytes, row by row, as a flat array: its own memory if contiguous, else a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def write_whole(path, chunks):
    """Write under another name, and rename once it is safe on disk: a crash leaves the older file whole."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temp, "wb") as file:
            file.writelines(chunks)                 # unlike a loop, lets go of each before it asks for the next
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


# -- Hugging Face folders --------------------------------------------------------------------------------------------

def load_weights(folder):
    """All tensors of a checkpoint folder, Mapped: those of model.safetensors, or of the shards that its index names.
    Every header is read and checked at once, and not yet a byte of a tensor."""
    folder, index = Path(folder), Path(folder) / INDEX
    if (folder / WHOLE).exists():
        return Mapped(read_header(folder / WHOLE)[2])
    if not index.exists():
        raise absent(folder, WHOLE)
    shards = parse_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise WeightsError(f"{index}: its weight_map must map the tensors to files")
    for shard in shards.values():                   # from a download: it must not lead out of the folder
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise WeightsError(f"{index}: {shard!r:.99} is not the plain name of a safetensors file")
    files = sorted(set(shards.values()))
    held = {shard: read_header(folder / shard)[2] for shard in files if (folder / shard).exists()}
    missing = [f"the file {shard}" for shard in files if shard not in held]
    missing += [f"{name} in {shard}" for name, shard in shards.items() if shard in held and name not in held[shard]]
    if missing:
        raise WeightsError(f"{index}: named there, but missing: {', '.join(missing)}")
    return Mapped({name: held[shard][name] for name, shard in shards.items()})


def check(module_state, loaded, where):
    """One WeightsError lists all loaded tensors that are missing, unexpected or misshaped for `module_state`, which may
    be on no device yet. `where`, the file or folder they came from, opens its message."""
    shapes = {name: list(loaded[name].shape) for name in loaded}            # looking one up reads none of it
    wanted = {name: list(tensor.shape) for name, tensor in module_state.items()}
    refuse(f"{where}: these tensors do not fit the model", {
        "missing": [name for name in wanted if name not in shapes],
        "unexpected": [name for name in shapes if name not in wanted],
        "misshaped": [f"{name} (is {shapes[name]}, should be {shape})" for name, shape in wanted.items()
                      if name in shapes and shapes[name] != shape],
        "no floating point": [f"{name} (is {loaded[name].dtype})" for name, tensor in module_state.items()
                              if name in shapes and tensor.is_floating_point() > loaded[name].is_floating_point()]})


@torch.no_grad()
def assign(module_state, loaded, where):
    """Copy each loaded tensor into the tensor of that name in `module_state`, in place and cast to its dtype, once they
    pass check(). After the last, one WeightsError lists all that are not finite as they arrived."""
    check(module_state, loaded, where)
    finite = {name: copy_into(tensor, loaded[name]) for name, tensor in module_state.items()}
    refuse(f"{where}: these tensors do not fit the model", {
        "not finite": [f"{name} (as {module_state[name].dtype})" for name in finite if not finite[name]]})


def copy_into(target, source):
    """Copy a tensor; whether it is finite where it arrived, and if that is a GPU, nobody has waited for the answer.
    NaN spreads to the extremes; to ask isfinite of every value takes ten times as long."""
    if source.dtype != target.dtype or not target.is_contiguous():
        source = source.to(target.device)           # or the CPU would cast and turn it for the GPU, into one more copy
    if target.dim() == 2 and target.stride(0) == 1:
        target, source = target.T, source.to(target.dtype).T        # many times faster than turned and cast at once
    target.copy_(source)
    values = target.float() if target.dtype.itemsize == 1 else target       # torch knows no extremes of float8
    return values.numel() == 0 or torch.stack(values.aminmax()).isfinite().all()


def refuse(sentence, faults):
    """One WeightsError with every list of `faults` that is not empty, if any is."""
    lists = [f"{fault}: {', '.join(names[:9])}{f' and {len(names) - 9} more' if len(names) > 9 else ''}"
             for fault, names in faults.items() if names]
    if lists:
        raise WeightsError(f"{sentence}; {'; '.join(lists)}")


def save_pretrained(folder, tensors, config, tokenizer_from, shard_bytes=5_000_000_000):
    """Write a folder that transformers loads: config.json, model.safetensors (above `shard_bytes` shards, and an index)
    and the TOKENIZER_FILES of the folder `tokenizer_from`. A model folder in its place is replaced as a whole."""
    sizes = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in tensors.items()}
    files = _shards(sizes, shard_bytes)
    with new_folder(folder) as temp:
        write_whole(temp / "config.json", [json.dumps(config, indent=2).encode() + b"\n"])
        take(TOKENIZER_FILES, tokenizer_from, temp)
        for file, names in files.items():
            write_safetensors(temp / file, {name: tensors[name] for name in names})
        if WHOLE not in files:
            weight_map = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_whole(temp / INDEX, [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"])


def _shards(sizes, limit):
    """{file: names} of at most `limit` bytes, filled as Hugging Face does: in order, and a tensor too large for any
    alone, ahead of the one that is being filled."""
    shards, filling, filled = [], [], 0
    for name, size in sizes.items():
        if size > limit:
            shards.append([name])
            continue
        if filled + size > limit:
            shards.append(filling)
            filling, filled = [], 0
        filling.append(name)
        filled += size
    if filling or not shards:
        shards.append(filling)
    n = len(shards)
    return {f"model-{i:05d}-of-{n:05d}.safetensors" if n > 1 else WHOLE: names for i, names in enumerate(shards, 1)}


def take(names, source, target):
    """Copy those of the files `names` that the folder `source` has, byte for byte."""
    for path in (Path(source) / name for name in names):
        if path.exists():
            write_whole(target / path.name, [path.read_bytes()])


@contextmanager
def new_folder(folder):
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


def absent(folder, wanted):
    """The error for a folder without `wanted`; if it has pickles instead, with why they are left alone."""
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    advice = (f", only {', '.join(pickles)}: a pickle can run code, so it is never loaded; name a revision of the "
              "model that has safetensors, or convert it once with transformers' from_pretrained and save_pretrained")
    return WeightsError(f"{folder}: there is no {wanted} here{advice if pickles else ''}")
