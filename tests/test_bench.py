"""bench.py: its numbers by hand, and that every part of it runs."""
import gc
import json
import re
from types import SimpleNamespace

import pytest
import torch
from commands import command, refused
from quick import slowly

from benchmarks import bench, measure
from benchmarks.flags import parse
from benchmarks.plans import BF16, CPU, H200, SHAPES

torch.set_num_threads(1)
MAIN = "benchmarks/__main__.py"
SMALL = ["--rows", "8", "--prompt", "6", "--new", "8", "--repeat", "1", "--preset", "s", "--device", "cpu",
         "--dtype", "float32"]


@pytest.fixture(autouse=True, scope="module")
def imported_objects_out_of_sight():
    """Each measurement collects garbage first; all that torch has imported need not be searched every time."""
    bench.random_policy(arguments())                    # imports the last of it
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def arguments(*flags):
    args = parse([*SMALL, *flags], "", bench.BENCHES)
    args.dtype, args.results, args.ceilings = torch.float32, [], {"tflops": 1e-3, "gbps": 1.}
    return args


@pytest.mark.parametrize("preset", ["tiny", "s", "m", "32k"])
def test_sizes_that_floors_are_made_of_are_those_of_the_model(preset):
    args = arguments("--preset", preset, "--lora_rank", "0")
    linear, head, kv, _ = measure.size(args)
    gpt = bench.random_policy(args).gpt
    assert linear == sum(layer.weight.numel() for _, layer in gpt.linears()) and head == gpt.head.numel()
    c = gpt.config
    assert kv == 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim


def test_floors_by_hand():
    """Shape s: 2 (4 64^2 + 3 64 256) = 131,072 weights, a head of 16,384, a cache of 256 numbers a token."""
    args = arguments("--slots", "2", "--lora_rank", "0")
    assert measure.pass_flops(args, [10], 3, 2, 3) == 2 * (2 * 131072 * 10 + 512 * 50) + 3 * 2 * 16384 * 3
    prompts, caps = [[1] * 10] * 4, [8, 8, 4, 4]
    compute = 2 * (2 * (131072 + 16384) + 512 * 13 + 512 * 2 / 3) / 1e9     # a context of 10 + (2 4 8 + 2 2 4) / 24
    prefill = 4 * (2 * 131072 * 10 + 512 * 50) / 1e9
    assert measure.decode_floor(args, prompts, caps) == pytest.approx(12 * compute + prefill, rel=1e-2)
    args.ceilings = {"tflops": 1e9, "gbps": 1.}                             # now the memory is what counts
    read = (131072 * 4 + 16384 * 4 + 2 * 256 * 4 * 13.33) / 1e9
    assert measure.decode_floor(args, prompts, caps) == pytest.approx(12 * read, rel=1e-2)
    assert measure.backward(args) == (3, 3)
    assert measure.backward(arguments("--lora_rank", "8", "--checkpointing")) == (3, 2)


def test_real_sizes_of_the_presets():
    """Parameters in billions, as their makers count them."""
    for preset, billions in (("0.5b", .494), ("1.5b", 1.544), ("7b", 6.738), ("qwen7b", 7.615), ("8b", 8.030)):
        linear, head, _, _ = measure.size(arguments("--preset", preset))
        assert linear + head * (1 if SHAPES[preset][-1] else 2) == pytest.approx(billions * 1e9, rel=2e-3)


@pytest.mark.parametrize("benches, flags", [slowly([], ["--lora_rank", "0"]), (["rollout", "dpo", "ppo", "memory"], [
    "--lora_rank", "4", "--int8", "--checkpointing", "--n", "2", "--no_cached", "--no_shared_prompt"])])
def test_every_bench_runs_and_the_last_line_is_one_document(benches, flags, tmp_path):
    done = command(MAIN, *benches, *SMALL, *flags, "--out", tmp_path / "new" / "x.json")
    assert not done.code, done.err
    *shown, last = done.out.splitlines()
    document = json.loads(last)
    assert document == json.loads((tmp_path / "new" / "x.json").read_text()) and max(map(len, shown)) <= 80
    names = [result["bench"].split()[0] for result in document["results"]]
    assert names == (benches or list(bench.BENCHES)) and not any("error" in result for result in document["results"])
    for result in document["results"]:
        if result["bench"] not in ("memory", "load"):
            assert result["seconds"] >= result["seconds_min"] > 0 and result["others"]["naive"]["ratio"] > 0
    top = document["ceilings"]["torch.float32"]
    assert top["tflops"] > 0 and top["gbps"] > 0


def test_what_fails_is_kept_and_does_not_stop_the_rest(monkeypatch, capsys):
    def broken(args):
        raise RuntimeError("no memory")
    monkeypatch.setitem(bench.BENCHES, "sft", broken)
    args = arguments("--against", "hf")
    args.ceilings = {}
    bench.measure(args, [("sft", {}), ("logprob", {"against": ["naive"]})])
    assert args.results[0]["error"] == "RuntimeError: no memory" and "naive" in args.results[1]["others"]
    args.seconds = -1
    bench.measure(args, [("logprob", {})])
    assert args.results[2]["error"] == "no time was left" and "no memory" in capsys.readouterr().err


def test_plans_name_what_there_is():
    known = vars(arguments())
    for name, changes in CPU + BF16 + H200:
        assert name in bench.BENCHES and changes.keys() <= known.keys() and changes["preset"] in SHAPES


@pytest.mark.slow
def test_the_plan_for_a_gpu_runs_from_end_to_end_in_small(capsys):
    """Its flags and its order, at a shape and in numbers that a CPU can bear."""
    small = {"preset": "s", "rows": 16, "slots": 8, "batch": 8, "new": 8, "micro_batch_tokens": 256, "compile": False}
    args = arguments("--lora_rank", "4", "--checkpointing", "--against", "naive", "--seconds", "600")
    args.ceilings = {}
    bench.measure(args, [(name, {**changes, **small, "against": ["naive"]}) for name, changes in H200])
    assert len(args.results) == len(H200) and not [r["error"] for r in args.results if "error" in r]
    ppo = next(result for result in args.results if result["bench"].startswith("ppo"))
    assert ppo["rollout_and_scoring_s"] > 0 and ppo["updates_s"] > 0 and "16x(6+8)" in capsys.readouterr().out


def fails(error):
    def bench(args):
        raise error
    return bench


def test_a_bench_that_fails_shows_in_the_exit_code_and_memory_is_said_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ceilings", lambda args: {"tflops": 1., "gbps": 1.})
    monkeypatch.setitem(bench.BENCHES, "sft", fails(MemoryError()))
    monkeypatch.setattr(bench, "CPU", [])
    monkeypatch.setattr(bench, "BF16", [("sft", {"dtype": torch.bfloat16})])
    monkeypatch.setattr(bench, "bf16_pays", lambda: True)
    assert json.loads(command(MAIN, "cpu", *SMALL).out.splitlines()[-1])["results"][0]["dtype"] == "torch.bfloat16"
    done = command(MAIN, "sft", "logprob", *SMALL)
    assert done.code == 1 and "Traceback" not in done.err
    assert re.search(r"^sft: out of memory.*fewer --rows", done.err, re.MULTILINE)
    refused(SimpleNamespace(code=done.code, err=done.err.splitlines()[-1]), 1, "failed: sft;")
    assert [len(result) > 2 for result in json.loads(done.out.splitlines()[-1])["results"]] == [False, True]


def test_an_interruption_keeps_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ceilings", lambda args: {"tflops": 1., "gbps": 1.})
    monkeypatch.setitem(bench.BENCHES, "sft", fails(KeyboardInterrupt()))
    refused(command(MAIN, "logprob", "sft", *SMALL, "--out", tmp_path / "x.json"), 130, "interrupted; .*--out")
    (result,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert result["bench"] == "logprob 2048x256" and result["seconds"] > 0


@pytest.mark.parametrize("flags, said", [
    (["walk"], "unknown: walk; choose from rollout"), (["--preset", "9b"], "invalid choice: '9b'"),
    (["--rows", "few"], "invalid int"), (["--rows", "0"], "--rows 0 makes no sense"),
    (["--seconds", "nan"], "--seconds nan makes no sense"), (["--rows", "8", "--n", "3"], "no multiple of --n 3"),
    (["--int8", "--lora_rank", "0"], "give --lora_rank"), (["--row", "8"], "unrecognized arguments: --row"),
    (["dpo", "--dtype", "float16", "--lora-rank", "0"], "round small updates"),
    (["h200", "--device", "cpu"], "h200 is a list for a GPU"), (["--out", "."], "directory")])
def test_bad_flags_are_one_sentence_and_exit_code_2(flags, said):
    refused(command(MAIN, *flags), 2, said)


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(command(MAIN, "--device", "cuda"), 2, "--device cuda: torch sees no GPU here")


def test_help_has_each_flag_once_and_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = command(MAIN, "--help")
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= 80
    said = done.out[done.out.index("positional"):]
    for name, value in vars(parse([], "", bench.BENCHES)).items():
        if name != "benches":
            (about,) = re.findall(rf"^  --{name}\b(.*?)(?=\n  -|\n\n|\Z)", said, re.MULTILINE | re.DOTALL)
            default = {"": "none", "['naive']": "naive"}.get(str(value), str(value))
            assert re.search(rf"\w.*\[{default}\]\s*$", about, re.DOTALL), (name, about)


@pytest.mark.slow
def test_the_peers_do_the_same_work():
    """Transformers: equal logits, and as many tokens as were asked for. TRL: DPO begins at log 2 as ours does, on the
    ids it was given, and neither a known reference nor smaller parts of the batch change the loss."""
    pytest.importorskip("transformers")
    peers = bench.peers
    gpt = bench.random_policy(arguments("--lora_rank", "0")).gpt
    ids = torch.randint(1, 256, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(peers.twin(gpt)(ids).logits, gpt(ids), atol=1e-5, rtol=1e-5)
    caps = [3, 9, 1, 5, 8, 2]
    for attention in ("sdpa", "eager"):
        assert peers.generate(gpt, ids.tolist(), caps, 3, n=3, attention=attention)() == [9, 8]
    assert peers.generate_batch(gpt, ids.tolist(), caps, 6, n=3)() == caps
    pytest.importorskip("trl")
    pairs = [([5, 6], [7, 8, 9], [10]), ([11], [12], [13, 14])]
    steps = [peers.dpo(gpt, pairs, .1, 1e-3, precompute_ref=known, micro=micro) for known in (0, 1) for micro in (0, 1)]
    first, second = ([step() for step in steps] for _ in range(2))
    assert first == pytest.approx([.693147] * 4, abs=1e-5) and max(second) < .693
    assert second == pytest.approx(second[:1] * 4, abs=1e-5)
    rows = [([5, 6], [7, 8, 9]), ([11], [12, 13])]
    losses = [peers.sft(gpt, rows, 1e-3, micro=micro) for micro in (0, 1)]
    assert losses[0]() == pytest.approx(losses[1](), abs=1e-5) and losses[0]() == pytest.approx(losses[1](), abs=1e-5)
