"""Weights on disk, held against the libraries that own the formats: safetensors, transformers and peft."""
import gc
import hashlib
import json
import mmap
import os
import re
import struct
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import adapters, weights
from data.adapters import load_adapter, lora_scale, merge, save_adapter
from data.weights import (DTYPES, WeightsError, assign, load_weights, read_safetensors, save_pretrained,
                          write_safetensors)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def official():
    return pytest.importorskip("safetensors.torch")


def make(dtype, shape, seed=0):
    """A tensor of any dtype, of random bits (for BOOL only those that mean something)."""
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))
    return bits.view(dtype).reshape(shape)


def one_of_each():
    return {f"{name} {kind}": make(dtype, shape) for name, dtype in DTYPES.items()
            for kind, shape in (("matrix", (3, 5)), ("scalar", ()), ("empty", (2, 0, 3)))}


def same(left, right):
    """Equal names, dtypes, shapes and bits; NaN counts as itself."""
    def bits(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
        and bits(left[name]) == bits(right[name]) for name in left)


def file_of(header, data=b"", length=None):
    """The bytes of a safetensors file around any header, true or not."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def info(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


# --- safetensors, both ways --------------------------------------------------------------------------------

def test_both_ways_with_the_official_library(tmp_path, official):
    tensors = one_of_each()
    write_safetensors(tmp_path / "ours", tensors)
    assert same(official.load_file(tmp_path / "ours"), tensors)
    official.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt", "é\n": "\u2028"})
    back, metadata = read_safetensors(tmp_path / "theirs")
    assert same(back, tensors) and metadata == {"format": "pt", "é\n": "\u2028"}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
shapes = st.lists(st.integers(0, 3), max_size=4)
any_tensor = st.builds(make, st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(texts, any_tensor, max_size=6), st.dictionaries(texts, texts, min_size=1, max_size=1))
def test_round_trip_with_the_bytes_of_the_official_library(tmp_path_factory, official, tensors, metadata):
    path = tmp_path_factory.getbasetemp() / "round_trip"
    write_safetensors(path, tensors, metadata)
    assert path.read_bytes() == official.save(tensors, metadata)
    back, back_metadata = read_safetensors(path)
    assert same(back, tensors) and back_metadata == metadata


def test_the_bytes_do_not_depend_on_order_or_layout(tmp_path):
    a, b = torch.arange(12.).reshape(3, 4), torch.arange(6).reshape(2, 3)
    write_safetensors(tmp_path / "1", {"a": a, "b": b})
    write_safetensors(tmp_path / "2", {"b": b, "a": torch.nn.Parameter(a.T.contiguous().T)})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_read_tensors_are_aligned_writable_and_their_own(tmp_path):
    header = {"u": info("U8", (3,), (0, 3)), "a": info(offsets=(3, 7)), "b": info(offsets=(7, 11))}
    (tmp_path / "odd").write_bytes(file_of(header, b"123" + struct.pack("<ff", 1.5, 2.5)))
    tensors, _ = read_safetensors(tmp_path / "odd")
    assert tensors["a"].data_ptr() % 4 == 0 and tensors["a"].untyped_storage().nbytes() == 4
    tensors["a"] += 1
    assert tensors["a"].item() == 2.5 and tensors["b"].item() == 2.5 and tensors["u"].tolist() == [49, 50, 51]
    os.rename(tmp_path / "odd", tmp_path / "model.safetensors")
    loaded = load_weights(tmp_path)["b"]                # mapped, where it can be
    assert loaded.data_ptr() % 4 == 0 and loaded.item() == 2.5


@pytest.mark.parametrize("tensors, metadata, rule", [
    ({"a": torch.zeros(2, dtype=torch.complex64)}, {}, "a .torch.complex64"),
    ({"__metadata__": torch.zeros(2)}, {}, "strings to strings"),
    ({"a": torch.zeros(2)}, {"step": 5}, "strings to strings"),
    ({"a": torch.zeros([1] * 65)}, {}, "impossible shape"),
    ({"a" * 100_000_000: torch.zeros(2)}, {}, "more than 100000000"),
])
def test_nothing_is_written_that_would_not_be_read(tmp_path, tensors, metadata, rule):
    with pytest.raises(WeightsError, match=rule):
        write_safetensors(tmp_path / "file", tensors, metadata)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_new_file_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *names: events.append("rename") or replace(*names))
    write_safetensors(tmp_path / "file", {"a": torch.ones(3)})
    assert events[:2] == [(tmp_path / "file").stat().st_size, "rename"]
    assert len(events) == (3 if os.name == "posix" else 2)          # then the folder, which has the name


# --- malformed files ---------------------------------------------------------------------------------------

FOUR = b"1234"
TWO = {"a": info(), "b": info(offsets=(4, 8))}
MALFORMED = {       # what is wrong: (the file, words of the message)
    "empty file": (b"", "not a safetensors file"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "not a safetensors file"),
    "length only": (file_of(b""), "not a safetensors file"),
    "header longer than the file": (file_of({}, length=3), "not a safetensors file"),
    "header longer than any": (file_of({}, length=2**64 - 1), "not a safetensors file"),
    "header cut": (file_of({"a": info()}, FOUR)[:30], "cut short"),
    "header of zeros": (bytes(64), "not a safetensors file"),
    "header is a list": (file_of(b"[]"), "not a safetensors file"),
    "header is not JSON": (file_of(b"{hello}"), "JSON is malformed"),
    "header ends early": (file_of({"a": info()}, FOUR, length=20), "JSON is malformed"),
    "header is UTF-16": (file_of("{}".encode("utf-16-le")), "JSON is malformed"),
    "header is not UTF-8": (file_of(b'{"__metadata__":{"a":"\xff"}}'), "utf-8"),
    "zero padding": (file_of(b"{}\0\0"), "JSON is malformed"),
    "two objects": (file_of(b"{}{}"), "JSON is malformed"),
    "half a surrogate pair": (file_of(b'{"__metadata__":{"a":"\\ud800"}}'), "half of a surrogate pair"),
    "deep JSON": (file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "recursion"),
    "deep lists": (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "recursion"),
    "an integer without end": (file_of(b'{"a":' + b"1" * 5000 + b"}"), "JSON is malformed"),
    "the same field twice": (file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                                     FOUR), "'dtype' is there twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "strings to strings"),
    "metadata of lists": (file_of({"__metadata__": []}), "strings to strings"),
    "tensor is null": (file_of({"a": None}), "'a' must have"),
    "tensor is a number": (file_of({"a": 1}), "'a' must have"),
    "no dtype": (file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR), "'a' must have"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR), "'a' must have"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "'a' must have"),
    "unknown dtype": (file_of({"a": info("F33")}, FOUR), "unknown dtype 'F33'"),
    "dtype in small letters": (file_of({"a": info("f32")}, FOUR), "unknown dtype"),
    "dtype is a number": (file_of({"a": info(32)}, FOUR), "unknown dtype 32"),
    "dtype is a list": (file_of({"a": info(["F32"])}, FOUR), "unknown dtype"),
    "shape is a number": (file_of({"a": info() | {"shape": 1}}, FOUR), "impossible shape 1"),
    "shape is a string": (file_of({"a": info() | {"shape": "1"}}, FOUR), "impossible shape"),
    "shape is null": (file_of({"a": info() | {"shape": None}}, FOUR), "impossible shape"),
    "shape with a float": (file_of({"a": info(shape=[1.0])}, FOUR), "impossible shape"),
    "shape with an exponent": (file_of(b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', FOUR),
                               "impossible shape"),
    "shape with NaN": (file_of({"a": info(shape=[float("nan")])}, FOUR), "NaN is no number"),
    "shape with true": (file_of({"a": info(shape=[True])}, FOUR), "impossible shape"),
    "shape with a string": (file_of({"a": info(shape=["1"])}, FOUR), "impossible shape"),
    "shape with a list": (file_of({"a": info(shape=[[1]])}, FOUR), "impossible shape"),
    "negative shape": (file_of({"a": info(shape=[-1])}, FOUR), "impossible shape"),
    "two negative sizes": (file_of({"a": info(shape=[-1, -1])}, FOUR), "impossible shape"),
    "size that wraps to 1": (file_of({"a": info(shape=[2**64 + 1])}, FOUR), "impossible shape"),
    "sizes that wrap to 0": (file_of({"a": info(shape=[2**32, 2**32], offsets=(0, 0))}), "impossible shape"),
    "bytes that wrap to 0": (file_of({"a": info(shape=[2**62], offsets=(0, 0))}), "needs"),
    "huge sizes, then a 0": (file_of({"a": info(shape=[2**40, 2**40, 0], offsets=(0, 0))}),
                             "impossible shape"),
    "a million sizes": (file_of({"a": info(shape=[2**62] * 1_000_000)}, FOUR), "impossible shape"),
    "offsets missing": (file_of({"a": info(offsets=())}, FOUR), "impossible data_offsets"),
    "one offset": (file_of({"a": info(offsets=[0])}, FOUR), "impossible data_offsets"),
    "three offsets": (file_of({"a": info(offsets=[0, 4, 4])}, FOUR), "impossible data_offsets"),
    "offsets as text": (file_of({"a": info(offsets=["0", "4"])}, FOUR), "impossible data_offsets"),
    "offset is false": (file_of({"a": info(offsets=[False, 4])}, FOUR), "impossible data_offsets"),
    "offset is a float": (file_of({"a": info(offsets=[0.0, 4.0])}, FOUR), "impossible data_offsets"),
    "negative offset": (file_of({"a": info(offsets=[-4, 0])}, FOUR), "impossible data_offsets"),
    "offsets the wrong way round": (file_of({"a": info(offsets=[4, 0])}, FOUR), "needs 4 bytes"),
    "span too small": (file_of({"a": info(offsets=[0, 3])}, b"123"), "needs 4 bytes"),
    "span too large": (file_of({"a": info(offsets=[0, 5])}, b"12345"), "needs 4 bytes"),
    "a scalar of 8 bytes": (file_of({"a": info(shape=[], offsets=[0, 8])}, FOUR * 2), "needs 4 bytes"),
    "data 1 byte short": (file_of({"a": info()}, b"123"), "cut short"),
    "data 1 byte long": (file_of({"a": info()}, b"12345"), "something was added"),
    "data without tensors": (file_of({}, FOUR), "something was added"),
    "the same bytes twice": (file_of({"a": info(), "b": info()}, FOUR), "overlap"),
    "half an overlap": (file_of({"a": info("U8", (4,)), "b": info("U8", (4,), (2, 6))}, b"123456"),
                        "overlap"),
    "a gap": (file_of({"a": info(), "b": info(offsets=(5, 9))}, b"123456789"), "gap"),
    "a gap at the front": (file_of({"a": info(offsets=(4, 8))}, FOUR * 2), "gap"),
    "an empty tensor inside another": (file_of({"a": info(), "z": info(shape=[0], offsets=(2, 2))}, FOUR),
                                       "overlap"),
    "an empty tensor past the end": (file_of({"a": info(), "z": info(shape=[0], offsets=(5, 5))}, FOUR),
                                     "gap"),
    "a claim of 16 EB": (file_of({"a": info(shape=[2**62], offsets=(0, 2**64))}, FOUR), "cut short"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 2\n",
                        "this is a Git LFS pointer, not the weights: "),
    "web page": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
    "web page without a doctype": (b"<html><body>404</body></html>", "web page"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(16), "GGUF"),
    "zip": (b"PK\3\4\0\0\10\10" + bytes(64), "zip.*never loaded"),
    "zip with a possible length": (b"PK\3\4\0\0\0\0" + bytes(64), "zip.*never loaded"),
    "pickle": (b"\x80\4\x95\x10\0\0\0\0\0\0\0}.", "pickle.*never loaded"),
    "old pickle": (b"\x80\2}q\0.", "pickle.*never loaded"),
}
STRICTER = {        # the format's text, or its contract here, says no, and the official reader says yes
    "space before the header": (file_of(b" {}"), "not a safetensors file"),
    "the same tensor twice": (file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                                      b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
                              "'a' is there twice"),
    "metadata is null": (file_of({"__metadata__": None}), "strings to strings"),
    "one field more": (file_of({"a": info(more=1)}, FOUR), "and nothing else"),
    "tensor is a list": (file_of({"a": ["F32", [1], [0, 4]]}, FOUR), "'a' must have"),
    "65 dimensions": (file_of({"a": info(shape=[1] * 65)}, FOUR), "impossible shape"),
    "a 0, then huge sizes": (file_of({"a": info(shape=[0, 2**40, 2**40], offsets=(0, 0))}),
                             "impossible shape"),
    "two values in a byte": (file_of({"a": info("F4", (2,), (0, 1))}, b"1"), "unknown dtype 'F4'"),
}
UNUSUAL = {         # and these are fine
    "no tensor": (file_of({}), {}),
    "metadata only": (file_of({"__metadata__": {"a": "b"}}), {}),
    "header padded": (file_of(b"{}  \t\r\n "), {}),
    "a scalar": (file_of({"a": info(shape=[])}, FOUR), {"a": []}),
    "names of all kinds": (file_of({"": info(), "\0é\n\U0001f600": info(offsets=(4, 8))}, FOUR * 2),
                           {"": [1], "\0é\n\U0001f600": [1]}),
    "header order is not data order": (file_of({"b": TWO["b"], "a": TWO["a"]}, FOUR * 2),
                                       {"a": [1], "b": [1]}),
    "nothing but empty tensors": (file_of({"a": info(shape=[0, 3], offsets=(0, 0)), "b": info(
        shape=[2**62, 0], offsets=(0, 0))}), {"a": [0, 3], "b": [2**62, 0]}),
    "empty tensors around": (file_of({"z": info(shape=[0], offsets=(4, 4)), "a": info(), "y": info(
        shape=[0], offsets=(0, 0))}, FOUR), {"y": [0], "a": [1], "z": [0]}),
    "unaligned": (file_of({"a": info("U8", (1,), (0, 1)), "b": info("F64", (1,), (1, 9))}, b"1" + FOUR * 2),
                  {"a": [1], "b": [1]}),
    "a header as long as a pickle's first bytes": (file_of({}, length=640)[:8] + b"{}".ljust(640), {}),
}


def index_of(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def as_file(path, data):
    path.write_bytes(data)
    return lambda: read_safetensors(path)[0]


def as_model(path, data):
    (path.parent / "model.safetensors").write_bytes(data)
    return lambda: load_weights(path.parent)


def as_shard(path, data):
    """A shard that the index says to hold `a`, behind a good one."""
    write_safetensors(path.parent / "first.safetensors", {"f": torch.ones(2)})
    (path.parent / "second.safetensors").write_bytes(data)
    index_of(path.parent, {"f": "first.safetensors", "a": "second.safetensors"})
    return lambda: load_weights(path.parent)


every_reader = pytest.mark.parametrize("reader", [as_file, as_model, as_shard])


@pytest.fixture
def no_memory(monkeypatch):
    """From here on, neither memory nor a map of a file may be asked for."""
    def refuse():
        monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("asked for memory"))
        monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("mapped a file"))
    return refuse


@every_reader
@pytest.mark.parametrize("case", MALFORMED | STRICTER)
def test_malformed_files_are_refused_before_memory_is_asked_for(tmp_path, no_memory, official, case, reader):
    data, rule = (MALFORMED | STRICTER)[case]
    read = reader(tmp_path / "bad.safetensors", data)
    path = max(tmp_path.glob("*.safetensors"))
    assert path.read_bytes() == data
    if case in MALFORMED:
        with pytest.raises(Exception):  # noqa: B017
            official.load_file(path)
    no_memory()
    with pytest.raises(WeightsError, match=rule) as error:
        read()
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < len(str(path)) + 400


@pytest.mark.parametrize("reader", [as_file, as_model])
@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_files_are_read(tmp_path, official, case, reader):
    data, shapes = UNUSUAL[case]
    tensors = reader(tmp_path / "file", data)()
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert same(tensors, official.load_file(next(tmp_path.iterdir())))


@every_reader
def test_an_overlap_bomb_is_refused_before_memory_is_asked_for(tmp_path, no_memory, reader):
    header = {f"t{i}": info("U8", (2**20,), (0, 2**20)) for i in range(15_000)}     # 15 GB out of 2 MB
    read = reader(tmp_path / "bomb", file_of(header, bytes(2**20)))
    no_memory()
    with pytest.raises(WeightsError, match="overlap"):
        read()


@pytest.mark.parametrize("change", [
    lambda path, data: os.truncate(path, len(data) - 1),                        # to touch this one would be fatal
    lambda path, data: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),     # other bytes, as far as we know
    lambda path, data: os.replace(write(path.with_name("new"), data + b" "), path)])
def test_a_file_that_changes_while_it_is_loaded(tmp_path, change):
    data = file_of(TWO, FOUR * 2)
    path = write(tmp_path / "model.safetensors", data)
    loaded = load_weights(tmp_path)
    assert loaded["a"].shape == (1,)
    change(path, data)
    with pytest.raises(WeightsError, match="model.safetensors: the file changed while it was being loaded"):
        loaded["a"]


def write(path, data):
    path.write_bytes(data)
    return path


GOOD = file_of({"__metadata__": {"format": "pt"}, "a": info("BF16", (2, 1)), "b": info("I8", (6,), (4, 10))},
               b"0123456789")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD)), st.integers(0, 4), st.binary(max_size=3))
def test_a_damaged_file_is_refused_or_read_as_officially(tmp_path_factory, official, at, cut, new):
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    path.write_bytes(GOOD[:at] + new + GOOD[at + cut:])
    try:
        tensors, _ = read_safetensors(path)
    except WeightsError as error:
        assert str(path) in str(error)
        with pytest.raises(WeightsError):
            load_weights(path.parent)
    else:
        assert same(tensors, official.load_file(path)) and same(load_weights(path.parent), tensors)


# --- Hugging Face folders ----------------------------------------------------------------------------------

def shards(folder, weight_map, **files):
    index_of(folder, weight_map)
    for name, tensors in files.items():
        write_safetensors(folder / f"{name}.safetensors", tensors)


def test_load_shards(tmp_path):
    a, b, c = torch.ones(2), torch.zeros(3), torch.arange(4)
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"},
           one={"a": a, "c": c}, two={"b": b, "left over": a})
    assert same(load_weights(tmp_path), {"a": a, "b": b, "c": c})


def test_load_shards_in_the_order_of_the_index_and_nothing_is_mapped_yet(tmp_path, no_memory):
    shards(tmp_path, {"b": "two.safetensors", "a": "one.safetensors", "c": "two.safetensors"},
           one={"a": torch.ones(2)}, two={"c": torch.ones(3), "b": torch.ones(4)})
    no_memory()
    loaded = load_weights(tmp_path)
    assert list(loaded) == ["b", "a", "c"] and len(loaded) == 3 and "a" in loaded and "d" not in loaded
    loaded.data["new"] = loaded.data.pop("b")
    del loaded["a"]
    assert list(loaded) == ["c", "new"] and loaded.data["new"].shape == [4]
    with pytest.raises(KeyError):
        loaded["b"]


@pytest.fixture
def maps(monkeypatch):
    """How many maps of files lived when each was made, itself included, with their bytes: [(how many, bytes)]."""
    made, live = [], weakref.WeakSet()

    class Counted(mmap.mmap):
        def __new__(cls, file, length, **options):
            self = super().__new__(cls, file, length, **options)
            live.add(self)
            made.append((len(live), length))
            return self
    monkeypatch.setattr(mmap, "mmap", Counted)
    gc.disable()                                        # maps must go without its help
    yield made, live
    gc.enable()


def test_a_tensor_is_mapped_with_its_own_pages_and_unmapped_with_its_last_reference(tmp_path, maps):
    made, live = maps
    tensors = {f"t{i}": make(torch.bfloat16, (300, 100 + i), i) for i in range(9)} | {"none": torch.ones(0, 2)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    loaded = load_weights(tmp_path)
    assert not made
    held = loaded["t3"]
    part = held[5:7]
    del held
    assert len(live) == 1 and same({"": part}, {"": tensors["t3"][5:7]})
    if Path("/proc/self/maps").exists():
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del part
    assert not live and [length - 2 * 300 * 103 < mmap.ALLOCATIONGRANULARITY for _, length in made] == [True]
    if Path("/proc/self/maps").exists():
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert same(loaded, tensors)


def test_no_second_copy_of_a_model_is_held_while_it_is_loaded(tmp_path, maps):
    made, live = maps
    tensors = {f"t{i}": torch.full((50, 60), float(i)) for i in range(20)}
    save_pretrained(tmp_path / "model", tensors, {}, tmp_path, shard_bytes=100_000)
    state = {name: torch.empty(60, 50, dtype=torch.bfloat16).T for name in tensors}
    assign(state, load_weights(tmp_path / "model"), "here")
    assert max(alive for alive, _ in made) == 1 and not live and len(made) >= 20
    assert same({name: tensor.float() for name, tensor in state.items()}, tensors)
    made.clear()
    read_safetensors(tmp_path / "model" / "model-00001-of-00003.safetensors")
    assert max(alive for alive, _ in made) == 1 and not live


def test_writing_to_a_loaded_tensor_changes_neither_the_file_nor_the_next_look_up(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.zeros(5000)})
    before, loaded = (tmp_path / "model.safetensors").read_bytes(), load_weights(tmp_path)
    mine = loaded["a"]
    mine += 1
    assert mine.sum() == 5000 and loaded["a"].sum() == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_everything_that_the_shards_lack_is_listed_at_once(tmp_path):
    shards(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors",
                      "d": "none.safetensors"}, one={"a": torch.ones(2)}, two={"b": torch.ones(2)})
    with pytest.raises(WeightsError, match="index.json.*: the file none.safetensors, b in one.safetensors, "
                                           "c in two.safetensors$"):
        load_weights(tmp_path)


@pytest.mark.parametrize("shard", [
    "../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "C:\\one.safetensors",
    "..\\one.safetensors", "-one.safetensors", ".safetensors", "one.safetensors\n", "one\0.safetensors",
    "one.bin", "", None, 1, ["one.safetensors"]])
def test_shard_names_lead_nowhere_else(tmp_path, shard):
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "one.safetensors", {"a": torch.ones(2)})
    shards(tmp_path / "model", {"a": shard})
    with pytest.raises(WeightsError, match="index.json.*not the plain name"):
        load_weights(tmp_path / "model")


@pytest.mark.parametrize("index", [
    b"", b"[]", b"{}", b"\xff", b'{"weight_map": {}}', b'{"weight_map": ["a"]}',
    b'{"weight_map": {"a": "b", "a": "c"}}', b"[" * 100_000])
def test_a_broken_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(WeightsError, match="index.json"):
        load_weights(tmp_path)


def test_a_folder_of_pickles_is_left_alone(tmp_path):
    for name in ("pytorch_model.bin", "optimizer.pt", "README.md"):
        (tmp_path / name).write_bytes(b"\x80\2}q\0.")
    with pytest.raises(WeightsError, match="only optimizer.pt, pytorch_model.bin: .*never loaded.*convert"):
        load_weights(tmp_path)


def test_a_folder_without_weights(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(WeightsError, match=f"{folder.name}: there is no model.safetensors here$"):
            load_weights(folder)


def test_assign_copies_in_place_and_casts():
    module = torch.nn.Linear(2, 3).to(torch.bfloat16)
    pointer = module.weight.data_ptr()
    loaded = {"weight": torch.randn(3, 2), "bias": torch.ones(3, dtype=torch.float64)}
    assign(dict(module.named_parameters()), loaded, "here")
    assert module.weight.data_ptr() == pointer and module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight, loaded["weight"].bfloat16()) and module.bias.tolist() == [1, 1, 1]


def test_assign_lists_every_fault_of_structure_at_once_and_copies_nothing():
    names = ("good", "flat", "nan", "lost", "last")
    zeros = {name: torch.zeros(2, 3, dtype=torch.float16) for name in names}
    loaded = {name: torch.ones(2, 3) for name in names[:3]}
    loaded |= {"flat": torch.ones(6), "more": torch.ones(1), "other": torch.ones(1)}
    loaded["nan"][0, 1] = float("nan")
    with pytest.raises(WeightsError) as error:
        assign(zeros, loaded, "some/folder")
    assert str(error.value) == ("some/folder: these tensors do not fit the model; missing: lost, last; "
                                "unexpected: more, other; misshaped: flat (is [6], should be [2, 3])")
    assert not any(tensor.any() for tensor in zeros.values())


def test_assign_finds_faults_of_structure_without_reading_a_tensor(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(3), "b": torch.ones(2)})
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("copied"))
    with pytest.raises(WeightsError, match=r"missing: c; unexpected: b; misshaped: a .is \[3\], should be \[1, 3\].$"):
        assign({"a": torch.ones(1, 3), "c": torch.ones(1)}, load_weights(tmp_path), "here")


def test_assign_then_lists_all_that_are_not_finite_where_they_arrive():
    names = ("good", "nan", "big", "wide")
    state = {name: torch.zeros(2, 3, dtype=torch.float16) for name in names} | {"wide": torch.zeros(2, 3)}
    loaded = {name: torch.ones(2, 3) for name in names}
    loaded["nan"][0, 1] = float("nan")
    loaded["big"][1, 2] = loaded["wide"][1, 2] = -1e5   # finite, but not as float16
    with pytest.raises(WeightsError) as error:
        assign(state, loaded, "some/folder")
    assert str(error.value) == ("some/folder: these tensors do not fit the model; not finite: "
                                "nan (as torch.float16), big (as torch.float16)")


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0., float("nan")])
def test_assign_fills_views_of_any_layout(tmp_path, source, target, value):
    """GPT-2's weights lie on disk as (in, out); a model may hold them as (out, in), or as a part of a larger one."""
    loaded = {name: torch.randn(4, 6).to(source) for name in ("turned", "part", "column")}
    loaded["column"] = torch.randn(4, 1).to(source)
    big, tall, wide = torch.zeros(6, 4, dtype=target), torch.zeros(9, 8, dtype=target), torch.zeros(4, 3, dtype=target)
    state = {"turned": big.T, "part": tall[2:6, 1:7], "column": wide[:, 1:2]}
    for tensor in loaded.values():
        tensor[3, 0] = value
    write_safetensors(tmp_path / "model.safetensors", loaded)
    if value != value:
        with pytest.raises(WeightsError, match=f"not finite: turned .as {target}., part .as {target}., column .as"):
            assign(state, load_weights(tmp_path), "here")
        return
    assign(state, load_weights(tmp_path), "here")
    assert same(state, {name: tensor.to(target) for name, tensor in loaded.items()})
    assert torch.equal(big, loaded["turned"].to(target).T) and tall.count_nonzero() == 23 and wide.count_nonzero() == 3


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.is_floating_point])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_assign_refuses_what_is_not_finite_in_every_dtype(dtype, value):
    if dtype == torch.float8_e4m3fn and "inf" in value:
        pytest.skip("e4m3 has no infinity")
    loaded = torch.zeros(5, 7)
    assign({"a": torch.empty(5, 7)}, {"a": loaded.to(dtype)}, "here")
    loaded[4, 6] = float(value)
    for target in (torch.float32, dtype):
        with pytest.raises(WeightsError, match="not finite: a"):
            assign({"a": torch.empty(5, 7, dtype=target)}, {"a": loaded.to(dtype)}, "here")


def test_assign_takes_integers_and_empty_tensors():
    state = {"steps": torch.zeros(2, dtype=torch.int64), "none": torch.zeros(0, 4), "on": torch.zeros(2).bool()}
    assign(state, {"steps": torch.tensor([1, 2**40]), "none": torch.ones(0, 4), "on": torch.ones(2).bool()}, "here")
    assert state["steps"].tolist() == [1, 2**40] and state["on"].all()


@pytest.fixture(scope="module")
def llama():
    """A tiny random Llama, the original that our folders are held against."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(12).reshape(2, 6)


def test_transformers_loads_what_we_save(tmp_path, llama):
    from transformers import AutoModelForCausalLM
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    copied = {name: f"{name}\r\né".encode() for name in weights.TOKENIZER_FILES if "config" not in name}
    for name, data in (copied | {"notes.txt": b"stays", "pytorch_model.bin": b"stays"}).items():
        (source / name).write_bytes(data)
    save_pretrained(target, llama.state_dict(), llama.config.to_dict(), source)
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors", *copied}
    assert {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
            "special_tokens_map.json", "chat_template.jinja"} == set(copied)
    assert all((target / name).read_bytes() == data for name, data in copied.items())
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(IDS).logits, llama(IDS).logits)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 12))
def test_shards_are_filled_as_hugging_face_fills_them(tmp_path_factory, sizes, limit):
    hub = pytest.importorskip("huggingface_hub")
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    split = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    folder = tmp_path_factory.getbasetemp() / "sharded"
    save_pretrained(folder, tensors, {}, folder, shard_bytes=limit)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == split.is_sharded
    assert {path.name for path in folder.glob("*.safetensors")} == set(split.filename_to_tensors)
    assert all(read_safetensors(folder / file)[0].keys() == set(names)
               for file, names in split.filename_to_tensors.items())
    if split.is_sharded:
        wanted = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        assert index.read_text() == json.dumps(wanted, indent=2, sort_keys=True) + "\n"
    assert same(load_weights(folder), tensors)


def test_transformers_loads_the_shards_that_we_save(tmp_path, llama):
    from transformers import AutoModelForCausalLM
    save_pretrained(tmp_path / "model", llama.state_dict(), llama.config.to_dict(), tmp_path, shard_bytes=4000)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 3
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, llama(IDS).logits)


@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
def test_we_load_what_transformers_saves(tmp_path, llama, max_shard_size):
    llama.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    loaded = load_weights(tmp_path)
    assert same(loaded, dict(llama.state_dict()))
    fresh = type(llama)(llama.config)
    assign(fresh.state_dict(), loaded, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, llama(IDS).logits)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_older_model_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    save_pretrained(target, {"a": torch.ones(2)}, {"old": True}, tmp_path)
    (target / "tokenizer.json").write_text("old")
    save_pretrained(target, {"b": torch.ones(2)}, {"old": False}, tmp_path)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((target / "config.json").read_text()) == {"old": False}
    assert list(load_weights(target)) == ["b"] and list(target.parent.iterdir()) == [target]
    (target / "tokenizer.json").write_text("kept")
    save_pretrained(target, load_weights(target), {}, target)       # in place: its own tokenizer comes along
    assert (target / "tokenizer.json").read_text() == "kept"


@pytest.mark.parametrize("fails_at", range(4))        # config.json, model.safetensors, old folder, new folder
def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch, fails_at):
    target, calls, replace = tmp_path / "model", [], os.replace
    save_pretrained(target, {"a": torch.ones(2)}, {"old": True}, tmp_path)
    before = contents(tmp_path)

    def fragile(*names):
        calls.append(names)
        if len(calls) == fails_at + 1:
            raise OSError(28, "No space left on device")
        replace(*names)
    monkeypatch.setattr(os, "replace", fragile)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(target, {"a": torch.zeros(2)}, {"old": False}, tmp_path)
    assert contents(tmp_path) == before


def test_the_remains_of_a_killed_save_do_not_stop_the_next(tmp_path):
    (tmp_path / "model").mkdir()
    for state in ("tmp", "old"):                        # with our process id: containers reuse them
        remains = tmp_path / f".model.{state}-{os.getpid()}"
        remains.mkdir()
        (remains / "tokenizer.json").write_text("stale")
    for _ in range(2):
        save_pretrained(tmp_path / "model", {"a": torch.ones(2)}, {}, tmp_path)
    assert sorted(path.name for path in contents(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious")
    with pytest.raises(WeightsError, match="run: holds files, but no weights"):
        save_pretrained(tmp_path / "run", {"a": torch.ones(2)}, {}, tmp_path)
    assert list(contents(tmp_path).values()) == [b"precious"]


# --- PEFT folders ------------------------------------------------------------------------------------------

TARGETS = ["q_proj", "down_proj"]


def adapter(model, rank):
    """Random LoRA tensors for the target modules of a model, under our names."""
    tensors = {}
    for path, module in model.named_modules():
        if path.split(".")[-1] in TARGETS:
            tensors[f"{path}.lora_A"] = torch.randn(rank, module.in_features)
            tensors[f"{path}.lora_B"] = torch.randn(module.out_features, rank)
    return tensors


def test_peft_loads_our_adapter_and_merges_it_alike(tmp_path, llama):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    tensors = adapter(llama, rank=3)
    assert "model.layers.0.self_attn.q_proj.lora_A" in tensors and len(tensors) == 8
    save_adapter(tmp_path / "adapter", tensors, 3, 6, TARGETS, "org/base")
    base = type(llama)(llama.config)
    base.load_state_dict(llama.state_dict())
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, weight in llama.state_dict().items():
        path = name.removesuffix(".weight")
        if f"{path}.lora_A" in tensors:
            weight = weight + 6 / 3 * tensors[f"{path}.lora_B"] @ tensors[f"{path}.lora_A"]
        torch.testing.assert_close(merged[name], weight)


def test_our_adapter_comes_back_as_it_was(tmp_path, llama):
    tensors = adapter(llama, rank=3)
    save_adapter(tmp_path / "adapter", tensors, 3, 6, TARGETS, "org/base")
    back, config = load_adapter(tmp_path / "adapter")
    assert same(back, tensors) and list(tmp_path.iterdir()) == [tmp_path / "adapter"]
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "lora_dropout": 0,
        "base_model_name_or_path": "org/base", "revision": None, "target_modules": sorted(TARGETS), "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "modules_to_save": None}


def test_we_load_what_peft_saves(tmp_path, llama):
    peft = pytest.importorskip("peft")
    base = type(llama)(llama.config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS,
                                                      init_lora_weights=False))
    model.save_pretrained(tmp_path)
    tensors, config = load_adapter(tmp_path)
    assert config["r"] == 2 and config["lora_alpha"] == 5 and len(tensors) == 8
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.lora_A"], layer.lora_A["default"].weight)
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.lora_B"], layer.lora_B["default"].weight)


def little(name):
    """A tiny random model of transformers, and the modules of it that an adapter goes on."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                         bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config).eval(), ["c_attn", "c_proj", "c_fc"]
    if name == "neox":
        config = transformers.GPTNeoXConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                            intermediate_size=24, max_position_embeddings=16)
        return transformers.GPTNeoXForCausalLM(config).eval(), ["query_key_value", "dense"]
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval(), TARGETS


def tuned(tmp_path, name, dtype=torch.float32, shard="1GB", **options):
    """base and adapter folders by the official libraries, and the model that peft merges them to."""
    peft = pytest.importorskip("peft")
    model, targets = little(name)
    model.to(dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)
    options = {"r": 3, "lora_alpha": 5, "target_modules": targets, "init_lora_weights": False} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=True)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name, path, sizes, turned", [
    ("gpt2", "transformer.h.1.attn.c_attn", [(3, 16), (48, 3)], True),          # stored (in, out), these are not
    ("gpt2", "transformer.h.1.mlp.c_proj", [(3, 64), (16, 3)], True),
    ("neox", "gpt_neox.layers.1.attention.query_key_value", [(3, 16), (48, 3)], False),     # one adapter for all three
    ("llama", "model.layers.1.mlp.down_proj", [(3, 24), (16, 3)], False)])
def test_what_peft_saves_for_each_family(tmp_path, name, path, sizes, turned):
    _, folder, _ = tuned(tmp_path, name)
    tensors, config = load_adapter(folder)
    assert [tuple(tensors[f"{path}.lora_{ab}"].shape) for ab in "AB"] == sizes
    assert config["fan_in_fan_out"] is turned and lora_scale(config) == 5 / 3


@pytest.mark.filterwarnings("error:fan_in_fan_out")     # peft warns where it has to turn the flag round
def test_peft_loads_our_adapter_of_gpt2(tmp_path):
    peft = pytest.importorskip("peft")
    model, targets = little("gpt2")
    tensors = {}
    for path, (rows, columns) in {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16)}.items():
        tensors[f"transformer.h.1.{path}.lora_A"] = torch.randn(2, columns)
        tensors[f"transformer.h.1.{path}.lora_B"] = torch.randn(rows, 2)
    save_adapter(tmp_path / "adapter", tensors, 2, 6, ["c_attn", "h.1.attn.c_proj"], "gpt2", fan_in_fan_out=True)
    assert load_adapter(tmp_path / "adapter")[1]["fan_in_fan_out"] is True
    weight = model.transformer.h[1].attn.c_proj.weight.clone()
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    delta = 3 * tensors["transformer.h.1.attn.c_proj.lora_B"] @ tensors["transformer.h.1.attn.c_proj.lora_A"]
    torch.testing.assert_close(loaded.transformer.h[1].attn.c_proj.weight, weight + delta.T)


def test_an_adapter_of_some_layers_with_rank_stabilised_scale(tmp_path):
    _, folder, merged = tuned(tmp_path, "llama", r=4, use_rslora=True, layers_to_transform=[1])
    tensors, config = load_adapter(folder)
    assert lora_scale(config) == 5 / 2 and len(tensors) == 4 and all(".layers.1." in name for name in tensors)
    path = "model.layers.1.self_attn.q_proj"
    weight = load_weights(tmp_path / "base")[f"{path}.weight"]
    torch.testing.assert_close(merged.state_dict()[f"{path}.weight"],
                               weight + 2.5 * tensors[f"{path}.lora_B"] @ tensors[f"{path}.lora_A"])


@pytest.mark.parametrize("key, value", [
    ("r", 0), ("r", -2), ("r", 2.0), ("r", True), ("r", None), ("lora_alpha", "4"), ("lora_alpha", True),
    ("use_rslora", "yes"), ("fan_in_fan_out", "auto"),
    ("rank_pattern", {"m": 2}), ("alpha_pattern", {"m": 2}), ("target_parameters", ["w"]), ("use_bdlora", {"a": 1}),
    ("layer_replication", [[0, 1]]), ("alora_invocation_tokens", [1]), ("monteclora_config", {"a": 1})])
def test_an_option_that_would_change_the_mathematics_is_refused(tmp_path, key, value):
    tensors = {"m.lora_A": torch.ones(2, 4), "m.lora_B": torch.ones(4, 2)}
    save_adapter(tmp_path / "adapter", tensors, 2, 4, ["m"], "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    load_adapter(path.parent)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(WeightsError, match=f"of one rank: {key} = ") as error:
        load_adapter(path.parent)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("said", ["NaN", "Infinity", "1e400"])
def test_an_alpha_that_is_no_number_is_refused(tmp_path, said):
    tensors = {"m.lora_A": torch.ones(2, 4), "m.lora_B": torch.ones(4, 2)}
    save_adapter(tmp_path / "adapter", tensors, 2, 4, ["m"], "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(re.sub('("lora_alpha": )[^,]*', rf"\g<1>{said}", path.read_text()))
    with pytest.raises(WeightsError, match=f"adapter_config.json: .*{said}"):
        load_adapter(path.parent)


def test_an_adapter_that_is_not_plain_lora_is_refused_with_every_reason(tmp_path):
    folder = tmp_path / "adapter"
    sizes = {"m.lora_A": (2, 4), "m.lora_B": (4, 2), "n.lora_A": (2, 4), "o.lora_A": (3, 4),
             "o.lora_B": (4, 3), "p.score": (4,), "q.lora_A": (2, 4, 1)}
    save_adapter(folder, {name: torch.ones(size) for name, size in sizes.items()}, 2, 4, ["m"], "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    changes = {"peft_type": "LOHA", "use_dora": True, "bias": "all", "lora_alpha": None,
               "rank_pattern": {"m": 3}, "init_lora_weights": "pissa", "modules_to_save": ["head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(WeightsError, match="adapter: not a plain LoRA adapter") as error:
        load_adapter(folder)
    for word in [f"{key} = {value!r}" for key, value in changes.items()] + [
            "n.lora_A without its lora_B", "o.lora_A.weight [3, 4]", "o.lora_B.weight [4, 3]",
            "p.score.weight [4]", "q.lora_A.weight [2, 4, 1]"]:
        assert word in str(error.value)
    assert "m.lora" not in str(error.value)


def test_an_adapter_folder_with_a_part_missing(tmp_path):
    with pytest.raises(WeightsError, match="no adapter_config.json here$"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\2}q\0.")
    with pytest.raises(WeightsError, match="no adapter_model.safetensors here, only adapter_model.bin"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    write_safetensors(tmp_path / "adapter_model.safetensors", {})
    with pytest.raises(WeightsError, match="adapter_config.json"):
        load_adapter(tmp_path)


# --- merging -----------------------------------------------------------------------------------------------

def hashes(folder):
    """Of each tensor in a folder's weights files, and of each file's bytes before them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        found[path.name] = data[:start]
        for name, place in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in place["data_offsets"])
                found[path.name, name] = hashlib.sha256(data[begin:end]).hexdigest()
    return found


def changed(base, merged):
    """The names of the tensors that differ; all else must be as it was."""
    before, after = hashes(base), hashes(merged)
    assert before.keys() == after.keys()
    differ = {key for key in before if before[key] != after[key]}
    assert all(isinstance(key, tuple) for key in differ), "a header changed"
    return {name for _, name in differ}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("shard", ["1GB", "4KB"])
@pytest.mark.parametrize("name, options", [("llama", {}), ("gpt2", {}), ("neox", {}), (
    "llama", {"use_rslora": True, "layers_to_transform": [1]})])
def test_a_merge_is_peft_s_and_leaves_all_else_as_it_was(tmp_path, name, options, shard):
    from transformers import AutoModelForCausalLM
    base, folder, official = tuned(tmp_path, name, shard=shard, **options)
    others = {"tokenizer.json": b"{ }\r\n", "merges.txt": b"a b", "chat_template.jinja": b"{{ 1 }}"}
    for file, data in (others | {"README.md": b"stays"}).items():
        (base / file).write_bytes(data)
    merge(tmp_path / "merged", folder, base)

    adapted = {name.rpartition(".")[0] + ".weight" for name in load_adapter(folder)[0]}
    assert changed(base, tmp_path / "merged") == adapted and len(adapted) == (
        8 if name == "gpt2" else 2 if options else 4)
    files = {path.name for path in base.iterdir()} - {"README.md"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == files
    copied = {file for file in files if not file.endswith(".safetensors")}
    assert copied >= {"config.json", *others} and ("model.safetensors.index.json" in copied) == (shard == "4KB")
    assert all((tmp_path / "merged" / file).read_bytes() == (base / file).read_bytes() for file in copied)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(IDS).logits
        torch.testing.assert_close(ours, official(IDS).logits, rtol=0, atol=1e-5)
        assert (ours - plain).abs().max() > .01


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_merge_is_summed_in_fp32_and_rounded_once(tmp_path, name, dtype):
    base, folder, _ = tuned(tmp_path, name, dtype)
    merge(tmp_path / "merged", folder, base)
    (tensors, config), before, after = load_adapter(folder), load_weights(base), load_weights(tmp_path / "merged")
    paths = {name.rpartition(".")[0] for name in tensors}
    assert changed(base, tmp_path / "merged") == {f"{path}.weight" for path in paths}
    twice = 0
    for path in paths:
        W, A, B = before[f"{path}.weight"], tensors[f"{path}.lora_A"].float(), tensors[f"{path}.lora_B"].float()
        delta = 5 / 3 * (A.T @ B.T if config["fan_in_fan_out"] else B @ A)
        exact = W.double() + delta.double()
        got = after[f"{path}.weight"]
        assert got.dtype == dtype
        # As near as the dtype allows, up to how fp32 itself rounds; a delta that is rounded first is further off.
        slack = torch.finfo(dtype).eps / 2 * exact.abs() * (1 + 1e-3) + 1e-6
        assert ((got.double() - exact).abs() <= slack).all()
        twice += ((W + delta.to(dtype)).double() - exact).abs().gt(slack).sum()
    assert twice > 0 or dtype == torch.float64


def test_a_merge_into_files_without_the_base_model_s_prefix(tmp_path):
    base, folder, official = tuned(tmp_path, "llama")
    held, _ = read_safetensors(base / "model.safetensors")
    write_safetensors(base / "model.safetensors", {name.removeprefix("model."): W for name, W in held.items()})
    merge(tmp_path / "merged", folder, base)
    loaded = load_weights(tmp_path / "merged")
    assert "layers.0.mlp.down_proj.weight" in loaded and len(loaded) == len(held)
    for name, W in official.state_dict().items():
        if name.removeprefix("model.") in loaded:
            torch.testing.assert_close(loaded[name.removeprefix("model.")], W)


def test_a_tensor_s_full_name_goes_before_the_one_without_its_prefix(tmp_path):
    base, folder = merging(tmp_path, {"a.m.weight": torch.zeros(4, 4), "m.weight": torch.zeros(4, 4)}, ["a.m"])
    merge(tmp_path / "merged", folder, base)
    assert changed(base, tmp_path / "merged") == {"a.m.weight"}


def merging(tmp_path, tensors, modules, size=(4, 4), value=1., **options):
    """A base of these tensors, and an adapter of rank 2 for modules whose weights are of this size, (out, in)."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_pretrained(base, tensors, {"any": 1}, tmp_path)
    lora = {}
    for module in modules:
        lora |= {f"{module}.lora_A": torch.ones(2, size[1]), f"{module}.lora_B": torch.full((size[0], 2), value)}
    save_adapter(folder, lora, 2, 2, ["m"], "base", **options)
    return base, folder


def test_a_merge_lists_all_that_does_not_fit(tmp_path):
    base, folder = merging(tmp_path, {
        "a.good.weight": torch.zeros(4, 6), "a.turned.weight": torch.zeros(6, 4), "flat.weight": torch.zeros(24),
        "a.int.weight": torch.zeros(4, 6).to(torch.int32), "a.small.weight": torch.zeros(4, 6).to(torch.float8_e4m3fn),
    }, ["a.good", "a.turned", "b.flat", "a.int", "a.small", "a.lost", "last"], size=(4, 6))
    with pytest.raises(WeightsError) as error:
        merge(tmp_path / "merged", folder, base)
    wanted = "should be floating point [4, 6])"
    assert str(error.value) == (
        f"{base}: these tensors do not fit the adapter {folder}; missing: a.lost.weight, last.weight; "
        f"wrong: a.int.weight (is torch.int32 [4, 6], {wanted}, "
        f"a.small.weight (is torch.float8_e4m3fn [4, 6], {wanted}, "
        f"a.turned.weight (is torch.float32 [6, 4], {wanted}, flat.weight (is torch.float32 [24], {wanted}")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_overflows_is_refused_and_leaves_the_older_folder(tmp_path):
    base, folder = merging(tmp_path, {"m.weight": torch.zeros(4, 4).half()}, ["m"], value=1e5)
    save_pretrained(tmp_path / "merged", {"a": torch.ones(2)}, {"old": True}, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(WeightsError, match="m.weight is not finite as torch.float16 once"):
        merge(tmp_path / "merged", folder, base)
    assert contents(tmp_path) == before


def test_a_merge_takes_the_place_of_an_older_one_but_never_of_its_base_or_adapter(tmp_path):
    base, folder = merging(tmp_path, {"m.weight": torch.zeros(4, 4)}, ["m"])
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(base)
    for target in (base, str(folder), tmp_path / "link", tmp_path / "adapter" / ".." / "base"):
        with pytest.raises(WeightsError, match="would be replaced"):
            merge(target, folder, base)
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before
    for _ in range(2):
        merge(str(tmp_path / "merged"), str(folder), str(base))
        assert load_weights(tmp_path / "merged")["m.weight"].tolist() == [[2.] * 4] * 4
    (base / "config.json").unlink()
    with pytest.raises(WeightsError, match="base: there is no config.json here$"):
        merge(tmp_path / "merged", folder, base)


def test_a_merge_holds_one_tensor_of_the_base_at_a_time(tmp_path, maps):
    made, live = maps
    base, folder = merging(tmp_path, {f"{i}.weight": torch.zeros(4, 4) for i in range(9)}, ["3", "5"])
    index_of(base, {"left": "from-an-older-save.safetensors"})      # nobody reads it beside model.safetensors
    made.clear()
    merge(tmp_path / "merged", folder, base)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["config.json", "model.safetensors"]
    assert max(alive for alive, _ in made) == 1 and not live
    assert changed(base, tmp_path / "merged") == {"3.weight", "5.weight"}


def test_the_module_needs_none_of_the_libraries_it_is_held_against():
    source = open(weights.__file__).read() + open(adapters.__file__).read()
    assert not any(f"import {name}" in source for name in ("safetensors", "transformers", "peft", "pickle"))
