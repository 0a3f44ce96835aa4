"""Weights on disk, held against the libraries that own the formats: safetensors, transformers and peft."""
import json
import os
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import weights
from data.weights import (DTYPES, WeightsError, assign, load_adapter, load_weights, read_safetensors,
                          save_adapter, save_pretrained, write_safetensors)

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
    assert events == [(tmp_path / "file").stat().st_size, "rename"]


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
    "half a surrogate pair": (file_of(b'{"__metadata__":{"a":"\\ud800"}}'), "surrogates"),
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
    "shape with NaN": (file_of({"a": info(shape=[float("nan")])}, FOUR), "impossible shape"),
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


@pytest.mark.parametrize("case", MALFORMED | STRICTER)
def test_malformed_files_are_refused_before_memory_is_asked_for(tmp_path, monkeypatch, official, case):
    data, rule = (MALFORMED | STRICTER)[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    if case in MALFORMED:
        with pytest.raises(Exception):  # noqa: B017
            official.load_file(path)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("asked for memory"))
    with pytest.raises(WeightsError, match=rule) as error:
        read_safetensors(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < len(str(path)) + 400


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_files_are_read(tmp_path, official, case):
    data, shapes = UNUSUAL[case]
    (tmp_path / "file").write_bytes(data)
    tensors, _ = read_safetensors(tmp_path / "file")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert same(tensors, official.load_file(tmp_path / "file"))


def test_an_overlap_bomb_is_refused_before_memory_is_asked_for(tmp_path, monkeypatch):
    header = {f"t{i}": info("U8", (2**20,), (0, 2**20)) for i in range(15_000)}     # 15 GB out of 2 MB
    (tmp_path / "bomb").write_bytes(file_of(header, bytes(2**20)))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("asked for memory"))
    with pytest.raises(WeightsError, match="overlap"):
        read_safetensors(tmp_path / "bomb")


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(file_of(TWO, FOUR + b"1"))
    whole = SimpleNamespace(st_size=len(file_of(TWO, FOUR * 2)))
    monkeypatch.setattr(os, "fstat", lambda _: whole)
    with pytest.raises(WeightsError, match="shrank while tensor 'b'"):
        read_safetensors(tmp_path / "file")


GOOD = file_of({"__metadata__": {"format": "pt"}, "a": info("BF16", (2, 1)), "b": info("I8", (6,), (4, 10))},
               b"0123456789")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD)), st.integers(0, 4), st.binary(max_size=3))
def test_a_damaged_file_is_refused_or_read_as_officially(tmp_path_factory, official, at, cut, new):
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(GOOD[:at] + new + GOOD[at + cut:])
    try:
        tensors, _ = read_safetensors(path)
    except WeightsError as error:
        assert str(path) in str(error)
    else:
        assert same(tensors, official.load_file(path))


# --- Hugging Face folders ----------------------------------------------------------------------------------

def shards(folder, weight_map, **files):
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensors in files.items():
        write_safetensors(folder / f"{name}.safetensors", tensors)


def test_load_shards(tmp_path):
    a, b, c = torch.ones(2), torch.zeros(3), torch.arange(4)
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"},
           one={"a": a, "c": c}, two={"b": b, "left over": a})
    assert same(load_weights(tmp_path), {"a": a, "b": b, "c": c})


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


def test_assign_lists_every_fault_at_once_and_copies_nothing():
    names = ("good", "flat", "nan", "big", "lost", "last")
    zeros = {name: torch.zeros(2, 3, dtype=torch.float16) for name in names}
    loaded = {name: torch.ones(2, 3) for name in names[:4]}
    loaded |= {"flat": torch.ones(6), "more": torch.ones(1), "other": torch.ones(1)}
    loaded["nan"][0, 1] = float("nan")
    loaded["big"][1, 2] = -1e5                          # finite, but not as float16
    with pytest.raises(WeightsError) as error:
        assign(zeros, loaded, "some/folder")
    assert str(error.value) == ("some/folder: these tensors do not fit the model; missing: lost, last; "
                                "unexpected: more, other; misshaped: flat (is [6], should be [2, 3]); "
                                "not finite: nan (as torch.float16), big (as torch.float16)")
    assert not any(tensor.any() for tensor in zeros.values())


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.is_floating_point])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_assign_refuses_what_is_not_finite_in_every_dtype(dtype, value):
    if dtype == torch.float8_e4m3fn and "inf" in value:
        pytest.skip("e4m3 has no infinity")
    loaded = torch.zeros(5, 7)
    assign({"a": torch.empty(5, 7)}, {"a": loaded.to(dtype)}, "here")
    loaded[4, 6] = float(value)
    with pytest.raises(WeightsError, match="not finite: a"):
        assign({"a": torch.empty(5, 7)}, {"a": loaded.to(dtype)}, "here")


def test_assign_takes_integers_and_empty_tensors():
    state = {"steps": torch.zeros(2, dtype=torch.int64), "none": torch.zeros(0, 4)}
    assign(state, {"steps": torch.tensor([1, 2**40]), "none": torch.ones(0, 4)}, "here")
    assert state["steps"].tolist() == [1, 2**40]


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
    assert len(copied) == 3 and all((target / name).read_bytes() == data for name, data in copied.items())
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(IDS).logits, llama(IDS).logits)


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
        "base_model_name_or_path": "org/base", "target_modules": sorted(TARGETS), "bias": "none",
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


def test_an_adapter_that_is_not_plain_lora_is_refused_with_every_reason(tmp_path):
    folder = tmp_path / "adapter"
    sizes = {"m.lora_A": (2, 4), "m.lora_B": (4, 2), "n.lora_A": (2, 4), "o.lora_A": (3, 4),
             "o.lora_B": (4, 3), "p.score": (4,), "q.lora_A": (2, 4, 1)}
    save_adapter(folder, {name: torch.ones(size) for name, size in sizes.items()}, 2, 4, ["m"], "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    changes = {"peft_type": "LOHA", "use_rslora": True, "use_dora": True, "bias": "all", "lora_alpha": None,
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


def test_the_module_needs_none_of_the_libraries_it_is_held_against():
    source = open(weights.__file__).read()
    assert not any(f"import {name}" in source for name in ("safetensors", "transformers", "peft", "pickle"))
