"""Weights on disk: reads and writes safetensors files and Hugging Face checkpoint folders.

A safetensors file is eight bytes that give the length of the header, a JSON header with the dtype, shape and position
of every tensor, and the bytes of the tensors (https://github.com/huggingface/safetensors, "Format"). A file may come
from anywhere, so check_header() checks each rule of the format before a tensor is read; the writer calls it too. Files
are mapped into memory and their tensors are read one at a time, so that loading never needs memory for a second copy of
the model. Left out: quantised formats, and pickles (.bin, .pt), which can run code when they are opened.
"""
import itertools
import json
import math
import mmap
import os
import re
import shutil
from collections import UserDict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from data import InputError, check_value, decode
from data.files import sync_folder, write_whole
from data.hub import INDEX, SHARD

# The official library sorts the tensors of a file by dtype in this order; the same order here gives the same bytes.
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}                         # older versions of transformers refuse files without it
MAX_HEADER = 100_000_000                            # bytes, as in the official library

# Other files that are found under the name of a weights file: {a pattern of their first bytes: what they are}.
OTHER_FORMATS = {
    rb"version https://git-lfs": "a Git LFS pointer, not the weights: `git lfs pull` brings the file itself",
    rb"\s*<[!?hH]": "a web page, not the weights: the download met a login or error page, so repeat it",
    rb"GGUF": "a GGUF file: only safetensors is read here, and most models have a repository with it",
    rb"PK\x03\x04": "a zip, as torch.save writes: its pickle can run code, so it is never loaded; take safetensors",
    rb"\x80[\x02-\x05][^\x00]": "a pickle: it can run code, so it is never loaded; take the model as safetensors",
}
WHOLE = "model.safetensors"                         # the file of a checkpoint that is not split into shards
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
                   "added_tokens.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


class WeightsError(InputError):
    """Weights that cannot be used. The message names the file, the tensor and what is wrong with it."""


# -- safetensors -----------------------------------------------------------------------------------------------------

class Place(NamedTuple):
    """Where a tensor is: in the file `path`, from byte `begin` on."""
    path: Path
    stamp: tuple                # _stamp() of the file when its header was checked
    begin: int
    dtype: torch.dtype
    shape: list

    def tensor(self):
        """Map the tensor's part of the file into memory. The map is freed with the tensor, and writing to the tensor
        does not change the file. WeightsError if the file has changed since its header was checked."""
        size = math.prod(self.shape) * self.dtype.itemsize
        if not size:
            return torch.empty(self.shape, dtype=self.dtype)        # zero bytes cannot be mapped
        before = self.begin % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            if _stamp(file) != self.stamp:              # reading mapped bytes that were cut off kills the process
                raise WeightsError(f"{self.path}: the file changed while it was being loaded")
            pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=self.begin - before)
        data = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=before)
        if before % self.dtype.itemsize:
            data = data.clone()                         # a view as numbers of this size needs an aligned address
        return data.view(self.dtype).view(self.shape)


class Mapped(UserDict):
    """A dict {name: tensor} that maps a tensor into memory when it is looked up, each time anew.

    A loop that drops each tensor before the next has one tensor in memory and one file open at a time; a thousand open
    files may be more than a process is allowed. `data` is {name: Place}: there, entries can be deleted or renamed
    without reading a tensor.
    """

    def __getitem__(self, name):
        return self.data[name].tensor()


def read_safetensors(path):
    """({name: tensor}, metadata) of one safetensors file. Each tensor has memory of its own.

    A malformed file raises WeightsError before memory for tensors is allocated, and tensors never need more memory than
    the file has bytes.
    """
    _, metadata, places = read_header(path)
    return {name: place.tensor().clone() for name, place in places.items()}, metadata


def write_safetensors(path, tensors, metadata=METADATA):
    """Write {name: tensor} to one safetensors file. An interrupted write leaves the old file, if any, as it was.

    The bytes do not depend on the order of the dict. A tensor under two names (tied weights) is written twice; Hugging
    Face leaves one of the names out, and callers should too. WeightsError for a dtype that the format does not have.
    """
    kinds = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    write_each(path, kinds, tensors.__getitem__, metadata)


def write_each(path, kinds, tensor, metadata=METADATA):
    """write_safetensors() of tensors that are made one at a time. kinds: {name: (dtype, shape)}; tensor(name) makes a
    tensor when its turn has come."""
    unknown = [f"{name} ({dtype})" for name, (dtype, _) in kinds.items() if dtype not in DTYPE_NAMES]
    if unknown:
        raise WeightsError(f"{path}: safetensors has no dtype for {', '.join(unknown)}")
    rank = {dtype: place for place, dtype in enumerate(DTYPE_NAMES)}
    kinds = dict(sorted(kinds.items(), key=lambda item: (rank[item[1][0]], item[0])))
    table, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in kinds.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)             # so that the data begins at a multiple of 8 bytes
    check_header(path, header, end)                 # never write a file that read_header() would refuse
    data = (raw_bytes(tensor(name).detach().cpu()) for name in kinds)
    write_whole(path, itertools.chain([len(header).to_bytes(8, "little"), header], data))


def read_header(path):
    """Read and check the header of one safetensors file; returns (head, metadata, places).

    head: all bytes before the data. metadata: {string: string}. places: {name: Place}, in the order of the data.
    Raises WeightsError for a malformed file.
    """
    with open(path, "rb") as file:
        stamp = size, _ = _stamp(file)
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if length > min(MAX_HEADER, size - 8) or start[8:9] != b"{":
            # Not checked earlier, because a good file with a header of 640 bytes begins like a pickle.
            for signature, kind in OTHER_FORMATS.items():
                if re.match(signature, start):
                    raise WeightsError(f"{path}: this is {kind}")
            raise WeightsError(f"{path}: not a safetensors file, or cut short: its {size} bytes begin with no header")
        file.seek(0)
        head = file.read(8 + length)
    metadata, entries = check_header(path, head[8:], size - 8 - length)
    places = {}
    for begin, _, name, dtype, shape in entries:
        places[name] = Place(path, stamp, len(head) + begin, dtype, shape)
    return head, metadata, places


def _stamp(file):
    """(size, time of the last change) of an open file; if they are the same later, the file has not changed."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def check_header(path, header, data_bytes):
    """Check the JSON header of a file whose tensors have `data_bytes` bytes; returns (metadata, entries).

    entries: [(begin, end, name, dtype, shape)], sorted by position. begin and end count from the data's first byte.
    Raises WeightsError for the first broken rule.
    """
    _rule(path, len(header) <= MAX_HEADER, f"the header has {len(header)} bytes, more than {MAX_HEADER}")
    table = parse_json(path, header)
    metadata = table.pop("__metadata__", {})
    are_strings = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    _rule(path, are_strings, "__metadata__ must map strings to strings")
    entries = [_entry(path, name, info) for name, info in table.items()]
    entries.sort(key=lambda entry: entry[:2])
    position = 0
    for begin, end, name, *_ in entries:
        # Overlapping tensors could need far more memory than the file has bytes; a gap could hide other data.
        _rule(path, begin == position,
              f"tensor {name!r:.99} begins at byte {begin}, not at {position}: an overlap or a gap")
        position = end
    _rule(path, position == data_bytes,
          f"its tensors end at byte {position}, the file at {data_bytes}: cut short, or something was added")
    return metadata, entries


def _entry(path, name, info):
    """Check what a header has for one tensor; returns (begin, end, name, dtype, shape)."""
    which = f"tensor {name!r:.99}"
    _rule(path, isinstance(info, dict) and info.keys() == {"dtype", "shape", "data_offsets"},
          f"{which} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    _rule(path, isinstance(dtype, str) and dtype in DTYPES, f"{which} has the unknown dtype {dtype!r:.99}")
    # torch supports 64 dimensions; the product of a million sizes would take too long. A size of 0 makes a tensor
    # empty, but torch still multiplies the other sizes to get its strides, so their product must fit in 63 bits.
    possible = _is_whole(shape) and len(shape) <= 64 and math.prod(max(size, 1) for size in shape) < 2**63
    _rule(path, possible, f"{which} has the impossible shape {shape!r:.99}")
    _rule(path, _is_whole(offsets) and len(offsets) == 2, f"{which} has impossible data_offsets {offsets!r:.99}")
    (begin, end), need = offsets, math.prod(shape) * DTYPES[dtype].itemsize
    _rule(path, end - begin == need, f"{which} of {dtype} {shape} needs {need} bytes, not offsets {offsets}")
    return begin, end, name, DTYPES[dtype], shape


def _rule(path, holds, sentence):
    """Raise WeightsError with the sentence unless the rule holds."""
    if not holds:
        raise WeightsError(f"{path}: {sentence}")


def _is_whole(numbers):
    """Whether this is a list of whole numbers of at least 0. True and 1.0 are equal to 1, but are not accepted."""
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def parse_json(path, data):
    """The JSON object (dict) in the bytes `data`. WeightsError if they are malformed, or if a key is there twice.

    It is as strict as the official library. `path` is the file that the message names.
    """
    try:
        table = decode(data.decode())
        check_value(table)
        if not isinstance(table, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its JSON is malformed: {error}") from None
    return table


def raw_bytes(tensor):
    """The bytes of a CPU tensor, row by row, as a flat numpy array: a view if it is contiguous, otherwise a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


# -- Hugging Face folders --------------------------------------------------------------------------------------------

def load_weights(folder):
    """All tensors of a checkpoint folder, as Mapped: those of model.safetensors, or of the shards in its index.

    Reads and checks the headers of all files, and no tensor. WeightsError if a file or tensor is missing or malformed.
    """
    folder, index = Path(folder), Path(folder) / INDEX
    if (folder / WHOLE).exists():
        return Mapped(read_header(folder / WHOLE)[2])
    if not index.exists():
        raise absent(folder, WHOLE)
    shards = parse_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise WeightsError(f"{index}: its weight_map must map the tensors to files")
    for shard in shards.values():                   # a downloaded index must not name files outside the folder
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
    """Raise one WeightsError that lists all loaded tensors which do not fit `module_state`, if there are any.

    module_state, loaded: {name: tensor}; those of module_state may be on the meta device. A tensor does not fit if it
    is missing, unexpected, of another shape, or of whole numbers where floating point is needed. `where` is the file or
    folder that the message names.
    """
    shapes = {name: list(loaded[name].shape) for name in loaded}            # maps the tensors, but reads no byte
    wanted = {name: list(tensor.shape) for name, tensor in module_state.items()}
    misshaped, no_floats = [], []
    for name, tensor in module_state.items():
        if name not in shapes:
            continue
        if shapes[name] != wanted[name]:
            misshaped.append(f"{name} (is {shapes[name]}, should be {wanted[name]})")
        if tensor.is_floating_point() and not loaded[name].is_floating_point():
            no_floats.append(f"{name} (is {loaded[name].dtype})")
    refuse(f"{where}: these tensors do not fit the model", {
        "missing": [name for name in wanted if name not in shapes],
        "unexpected": [name for name in shapes if name not in wanted],
        "misshaped": misshaped, "no floating point": no_floats})


@torch.no_grad()
def assign(module_state, loaded, where):
    """Copy each loaded tensor into the tensor of the same name in `module_state`, in place, cast to the latter's dtype.

    check() is called first. After the last copy, one WeightsError lists all tensors that are not finite in the new
    dtype, if there are any. Arguments as in check().
    """
    check(module_state, loaded, where)
    finite = {name: copy_into(tensor, loaded[name]) for name, tensor in module_state.items()}
    refuse(f"{where}: these tensors do not fit the model", {
        "not finite": [f"{name} (as {module_state[name].dtype})" for name in finite if not finite[name]]})


def copy_into(target, source):
    """Copy a tensor into another one of the same shape; returns whether all copied values are finite.

    On a GPU the result is a tensor that is not waited for. The smallest and the largest value are enough: one NaN makes
    both NaN, and calling isfinite on every value takes ten times as long.
    """
    if source.dtype != target.dtype or not target.is_contiguous():
        source = source.to(target.device)           # otherwise the CPU casts or transposes it, into one more copy
    if target.dim() == 2 and target.stride(0) == 1:                         # the target is stored transposed
        # To cast first and transpose then is many times faster than to do both at once.
        target, source = target.T, source.to(target.dtype).T
    target.copy_(source)
    return is_finite(target)


def is_finite(tensor):
    """Whether all values of a tensor are finite; on a GPU a tensor."""
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor       # torch has no aminmax for float8
    return values.numel() == 0 or torch.stack(values.aminmax()).isfinite().all()


def refuse(sentence, faults):
    """Raise WeightsError if there are faults. faults: {kind of fault: names of tensors}. It shows nine of each kind."""
    lists = []
    for fault, names in faults.items():
        more = f" and {len(names) - 9} more" if len(names) > 9 else ""
        if names:
            lists.append(f"{fault}: {', '.join(names[:9])}{more}")
    if lists:
        raise WeightsError(f"{sentence}; {'; '.join(lists)}")


def save_pretrained(folder, tensors, config, tokenizer_from, shard_bytes=5_000_000_000):
    """Write a checkpoint folder that transformers can load: config.json, the weights, and the tokenizer.

    tensors: {name: tensor}; they go to model.safetensors, or if they have more than `shard_bytes` bytes, to several
    files with an index. The TOKENIZER_FILES are copied from the folder `tokenizer_from`. A model folder of this name is
    replaced as a whole; WeightsError if the folder holds other files.
    """
    sizes = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in tensors.items()}
    files = _shards(sizes, shard_bytes)
    with new_folder(folder) as temp:
        write_whole(temp / "config.json", [json.dumps(config, indent=2).encode() + b"\n"])
        copy_files(TOKENIZER_FILES, tokenizer_from, temp)
        for file, names in files.items():
            write_safetensors(temp / file, {name: tensors[name] for name in names})
        if WHOLE not in files:
            write_index(temp, {file: {name: sizes[name] for name in names} for file, names in files.items()})


def write_index(folder, files):
    """Write the index of a checkpoint of several files. files: {file name: {tensor name: bytes}}."""
    sizes = [size for tensors in files.values() for size in tensors.values()]
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    write_whole(folder / INDEX, [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"])


def _shards(sizes, limit):
    """{file name: tensor names} with at most `limit` bytes in a file, split as Hugging Face splits them.

    sizes: {tensor name: bytes}. Tensors are taken in order. A tensor above the limit gets a file of its own, which
    comes before the file that is being filled at that point.
    """
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
    if n == 1:
        return {WHOLE: shards[0]}
    return {f"model-{i:05d}-of-{n:05d}.safetensors": names for i, names in enumerate(shards, 1)}


def copy_files(names, source, target):
    """Copy the files `names` from the folder `source` to the folder `target`; files that are not there are skipped."""
    for path in (Path(source) / name for name in names):
        if path.exists():
            write_whole(target / path.name, [path.read_bytes()])


@contextmanager
def new_folder(folder):
    """Yield a temporary folder, which becomes `folder` at the end of the with block, or is deleted after an error.

    WeightsError if `folder` exists and has files but no weights, since it is then no model that may be replaced.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not any(folder.glob("*.safetensors")):
        raise WeightsError(f"{folder}: holds files, but no weights to replace; name another folder")
    temp, old = (folder.with_name(f".{folder.name}.{state}-{os.getpid()}") for state in ("tmp", "old"))
    shutil.rmtree(temp, ignore_errors=True)         # a killed process may have had the same id
    temp.mkdir(parents=True)
    try:
        yield temp
        if folder.exists():
            # Two folders cannot be swapped in one call. A process killed between the two renames leaves both, complete,
            # under their hidden names.
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(temp, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)


def absent(folder, wanted):
    """The WeightsError to raise for a folder without the file `wanted`. If the folder has pickles instead, the message
    explains why they are not loaded."""
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    advice = (f", only {', '.join(pickles)}: a pickle can run code, so it is never loaded; name a revision of the "
              "model that has safetensors, or convert it once with transformers' from_pretrained and save_pretrained")
    return WeightsError(f"{folder}: there is no {wanted} here{advice if pickles else ''}")
