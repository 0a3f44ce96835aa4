"""Measures speed and memory, and compares them with the hardware's limits.

    python -m benchmarks                       everything, on a tiny model
    python -m benchmarks rollout ppo --preset 7b        at LLaMA-7B's shape
    python -m benchmarks dpo --preset m --against trl   beside TRL, if installed
    python -m benchmarks h200 --out benchmarks/h200.json
                                               a big GPU, in nine minutes
    python -m benchmarks cpu --against hf hf_batch trl --seconds 3000
                                               ratios on a CPU

The weights are random, the shapes and lengths are real. A result shows tokens
per second, padding not counted; seconds (median and least of --repeat runs
after a warm-up; on a CPU, CPU seconds of one thread); the floor in per cent of
the median; the peak of memory above the weights; and how many times as long
the others in --against take.
The floor is the time that the arithmetic and the memory traffic for these
tokens would take at the speeds that this machine reaches in one large matrix
product and one large copy. The last line of the output is a JSON document with
all results.
"""
import argparse
import json
import math
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

import model
from benchmarks import flags, peers
from benchmarks.measure import (backward, ceilings, clock, decode_floor, memory_in_use, pass_flops, processor,
                                reset, seconds_for, timed)
from benchmarks.plans import BF16, CPU, H200, LENGTHS, SHAPES
from data import Refusal, families
from data.weights import write_safetensors
from products import bf16_pays
from rlhf import dpo, policy, ppo, reward, sampler, sft, update
from rlhf.experience import collect
from rlhf.logprobs import ChunkedLogProb, token_logps
from rlhf.pairs import pair_lengths, rows_of
from rlhf.update import plainly

# -- what is run: models and lengths -------------------------------------------------------------------------------

def random_policy(args):
    """A Policy with random weights in the shape --preset, made on the device; with --lora_rank it has an adapter."""
    V, D, mlp, L, H, K, tied = SHAPES[args.preset]
    config = model.GPTConfig(V, D, mlp, L, H, K, tie_word_embeddings=tied)
    with torch.device("meta"):
        gpt = model.GPT(config)
    gpt = gpt.to(args.dtype).to_empty(device=args.device).requires_grad_(False)
    generator = torch.Generator(args.device).manual_seed(0)
    for name, p in gpt.named_parameters():
        p.fill_(1) if "norm" in name else p.normal_(0, .02, generator=generator)
    if args.int8:
        gpt.quantise()
    gpt.make_contiguous()
    if args.compile:
        gpt.compile_blocks()
    gpt.checkpointing = args.checkpointing
    if not args.lora_rank:
        return policy.Policy(gpt)
    gpt.add_role("sft", args.lora_rank, 2 * args.lora_rank)
    for p in gpt.adapter("sft").values():
        p.data.normal_(0, .01, generator=generator)
    return policy.Policy(gpt.requires_grad_(False), "sft")


def lengths(n, longest, kind, seed):
    """n random lengths from 1 to `longest`, log-normal with the median and the 90th percentile in LENGTHS[kind].

    AlpacaFarm's answers are log-normal: kind "alpaca" after SFT, "rlhf" after PPO. All are `longest` for "fixed".
    """
    median, high = LENGTHS[kind]
    sigma = math.log(high / median) / 1.2816            # 1.2816: the 90th percentile of the standard normal
    r, out = random.Random(seed), []
    for _ in range(n):
        length = longest * median * math.exp(sigma * r.gauss(0, 1))
        out.append(min(longest, max(1, round(length))))
    return out


def texts(args, sizes, seed):
    """Lists of random token ids with these lengths; 0, which the peers take for EOS, is left out."""
    r, V = random.Random(seed), SHAPES[args.preset][0]
    return [[r.randrange(1, V) for _ in range(size)] for size in sizes]


def workload(args, n, kind=None):
    """(n prompts, n answers), as token ids; `kind` replaces --prompt_lengths and --lengths."""
    prompts = lengths(n, args.prompt, kind or args.prompt_lengths, 1)
    return texts(args, prompts, 2), texts(args, lengths(n, args.new, kind or args.lengths, 3), 4)


def settings(args, cls, **more):
    """A method's Config with the flags that the benches share."""
    return cls(lora_rank=args.lora_rank, micro_batch_tokens=args.micro_batch_tokens, slots=args.slots,
               graph=args.graph, max_new_tokens=args.new, **more)


def line(args, name, tokens, floor, took):
    """Print one result and add it to args.results: our time against the floor, the others' against ours.

    tokens: how many the work has. floor: seconds. took: what timed() returns, with ours under "ours".
    """
    median, least, peak = took["ours"]
    result = {"bench": name, "preset": args.preset, "lengths": args.lengths, "lora_rank": args.lora_rank,
              "dtype": str(args.dtype), "int8": args.int8, "compile": args.compile, "tokens": tokens,
              "seconds": median, "seconds_min": least,
              "tokens_per_s": tokens / median, "floor_s": floor, "percent_of_floor": 100 * floor / median,
              "peak_gb": peak / 1e9, "others": {
                  other: {"seconds": s, "seconds_min": low, "ratio": s / median, "ratio_min": low / least,
                          "peak_gb": p / 1e9} for other, (s, low, p) in took.items() if other != "ours"}}
    args.results.append(result)
    show(args, name, f"{result['tokens_per_s']:,.0f} tok/s", f"{median:.3f} s (least {least:.3f})",
         f"{result['percent_of_floor']:.0f} % of the floor", f"+{result['peak_gb']:.2f} GB")
    for other, o in result["others"].items():
        memory = o["peak_gb"] / max(1e-3, result["peak_gb"])
        print(f"    {other}: {o['ratio']:.2f} x the time, {memory:.1f} x the memory", flush=True)


def show(args, name, *numbers):
    """Print the name of a bench, and its numbers on the next line."""
    print(f"{name}, {args.preset}\n    {' | '.join(numbers)}", flush=True)


# -- the benches ---------------------------------------------------------------------------------------------------

def bench_rollout(args):
    """Sampling. naive: batches of equal size, each padded and decoded to its longest answer, without CUDA graphs."""
    n, (_, answers) = args.n, workload(args, args.rows)
    prompts, caps = workload(args, args.rows // n)[0], [len(answer) for answer in answers]
    repeated = [prompt for prompt in prompts for _ in range(n)]
    ours = random_policy(args)
    slots = min(args.rows, args.slots or sampler.slots_that_fit(ours.gpt, args.prompt + args.new, sampler.ALL))

    def naive():
        for i in range(0, args.rows, slots):
            batch = caps[i:i + slots]
            sampler.sample(ours, repeated[i:i + slots], [-1], [max(batch)] * len(batch), graph=False)

    runs = {"ours": lambda: sampler.sample(ours, prompts, [-1], caps, n=n, slots=args.slots, graph=args.graph)}
    if "naive" in args.against:
        runs["naive"] = naive
    if "hf" in args.against:
        runs["hf"] = peers.generate(ours.gpt, prompts, caps, slots, n, args.lora_rank)
        if args.device == "cpu":                        # where it is sometimes the quicker one
            runs["hf, eager attention"] = peers.generate(ours.gpt, prompts, caps, slots, n, args.lora_rank, "eager")
    if "hf_batch" in args.against:
        runs["hf_batch"] = peers.generate_batch(ours.gpt, prompts, caps, slots, n, args.lora_rank)
    name = f"rollout {args.rows}x({args.prompt}+{args.new})" + (f" n={n}" if n > 1 else "")
    line(args, name, sum(caps), decode_floor(args, repeated, caps), timed(args, runs))


def bench_logprob(args):
    """Token log-probs and their gradient. naive: all logits at once, log_softmax, autograd."""
    V, D = SHAPES[args.preset][:2]
    N = args.micro_batch_tokens // 2
    h = torch.randn(N, D, device=args.device, dtype=args.dtype, requires_grad=True)
    W = torch.randn(V, D, device=args.device, dtype=args.dtype)
    targets = torch.randint(V, (N,), device=args.device)

    def naive():
        logits = (h @ W.T).float()
        logits.log_softmax(-1).gather(1, targets[:, None]).sum().backward()

    runs = {"ours": lambda: ChunkedLogProb.apply(h, W, targets, 1., 1024).sum().backward()}
    if "naive" in args.against:
        runs["naive"] = naive
    line(args, f"logprob {N}x{V}", N, seconds_for(args, 2 * 2 * N * D * V), timed(args, runs))


def bench_sft(args):
    """One optimizer step of SFT. naive: every row padded to the longest prompt and answer allowed."""
    rows = list(zip(*workload(args, args.rows)))
    ours = random_policy(args)
    log = SimpleNamespace(step=lambda *_: None, resumed=lambda items, *kept: enumerate(items), last={"loss": None})
    cfg = settings(args, sft.Config, epochs=1, batch_size=args.rows)
    runs = {"ours": lambda: sft.train(ours, rows, cfg, log)}
    if "naive" in args.against:
        padded = list(zip(*workload(args, args.rows, "fixed")))
        runs["naive"] = lambda: sft.train(ours, padded, cfg, log)
    if "trl" in args.against:
        runs["trl"] = peers.sft(ours.gpt, rows, 1e-5, args.lora_rank)
        runs["trl, sorted by length"] = peers.sft(ours.gpt, rows, 1e-5, args.lora_rank, -(-args.rows // 4))
    answer_tokens, tokens = sum(len(r) for _, r in rows), [len(p) + len(r) for p, r in rows]
    floor = seconds_for(args, pass_flops(args, tokens, answer_tokens, *backward(args)))
    line(args, f"sft {args.rows} rows", sum(tokens), floor, timed(args, runs))


def bench_dpo(args):
    """One optimizer step of DPO. With --cached the reference's log-probs are computed before, as dpo.run() does.
    So does TRL then. naive: every row padded to the longest allowed, the prompt computed twice, the reference computed
    in the step."""
    def random_pairs(kind):
        prompts, chosen = workload(args, args.rows, kind)
        rejected = texts(args, lengths(args.rows, args.new, kind or args.lengths, 5), 6)
        return [((p, c), (p, r)) for p, c, r in zip(prompts, chosen, rejected)]

    ref = random_policy(args)
    ours, cfg = ref.copy("policy"), settings(args, dpo.Config, shared_prompt=args.shared_prompt)
    updater = update.Updater(ours.trainable(), 1e-5, 1000, fp16=ours.fp16)

    def step(pairs, ref_logps, cfg):
        """The same as in a step of dpo.run()."""
        for micro in update.micro_batches(range(len(pairs)), pair_lengths(pairs), cfg.micro_batch_tokens):
            logp = dpo.logps(ours, [pairs[i] for i in micro], cfg)                       # (2, b)
            losses, _ = dpo.dpo_loss(logp, ref_logps[:, micro], None, cfg)
            updater.add(losses.sum(), len(micro))
        updater.step()

    pairs = random_pairs(None)
    known = dpo.all_logps(ref, pairs, cfg)
    runs = {"ours": lambda: step(pairs, known if args.cached else dpo.all_logps(ref, pairs, cfg), cfg)}
    if "naive" in args.against:
        plain, padded = settings(args, dpo.Config, shared_prompt=False), random_pairs("fixed")
        runs["naive"] = lambda: step(padded, dpo.all_logps(ref, padded, plain), plain)
    if "trl" in args.against:
        how = ref.gpt, [(p, c, r) for (p, c), (_, r) in pairs], .1, 1e-5, args.lora_rank, args.cached
        runs |= {"trl": peers.dpo(*how), "trl, sorted by length": peers.dpo(*how, -(-args.rows // 2))}
    tokens = [t for (p, c), (_, r) in pairs for t in (len(p) + len(c), len(r))]
    answer_tokens = sum(len(response) for _, response in rows_of(pairs))
    floor = seconds_for(args, pass_flops(args, tokens, answer_tokens, *backward(args)))
    name = f"dpo {args.rows} pairs" + ", cached ref" * args.cached + ", prompt twice" * (not args.shared_prompt)
    line(args, name, sum(pair_lengths(pairs)), floor, timed(args, runs))


def ppo_roles(args):
    """(policy, reference, reward model, value model, updater); the updater trains the policy and the value model."""
    ref = random_policy(args)
    reward_model = reward.fresh(ref.copy("reward"))
    reward_model.head.weight.data.normal_(0, .02)
    ours, value = ref.copy("policy"), reward_model.copy("value")
    return ours, ref, reward_model, value, update.Updater(ours.trainable() + value.trainable(), 1e-5, 10_000,
                                                           fp16=ours.fp16)


def ppo_step(args, roles, prompts, caps, cfg):
    """The same as in a step of ppo.run(), with answers of caps[i] tokens; returns the seconds of rollout and scoring,
    and those of the updates."""
    ours, ref, reward_model, value, updater = roles
    start = clock(args.device)
    cfg.max_new_tokens, text = caps, SimpleNamespace(stops=[-1], thinks=False)
    roll = collect(prompts, text, ours, ref, reward.scorer(reward_model, cfg), cfg, 0)
    values = roll.per_token(value.values, cfg)
    middle = clock(args.device)
    rewards = ppo.shape_rewards(roll.score, roll.logp - roll.ref_logp, roll.mask, cfg.kl_coef)
    advantages, returns = ppo.gae(rewards, values, roll.mask, cfg.gamma, cfg.lam)
    advantages = ppo.whiten(advantages, roll.mask)
    for batch in update.batches(len(prompts), cfg.batch_size, cfg.num_ppo_epochs, 0):
        for micro in update.micro_batches(batch, roll.lengths, cfg.micro_batch_tokens):
            ids, mask, old_logp, old_v, a, r = roll.cut(micro, roll.logp, values, advantages, returns)
            logp = token_logps(ours, ids, mask, cfg.temperature)
            updater.add(ppo.policy_loss(logp, old_logp, a, mask, cfg.cliprange)[0], sum(caps[i] for i in micro))
            v = value.values(ids, mask)
            updater.add(cfg.vf_coef * ppo.value_loss(v, old_v, r, mask, cfg.cliprange_value)[0], 0)
        updater.step()
    return middle - start, clock(args.device) - middle


def bench_ppo(args):
    """A step of PPO with two epochs. naive: prompts and answers padded to the longest, as in AlpacaFarm."""
    prompts, answers = workload(args, args.rows)
    caps, roles = [len(answer) for answer in answers], ppo_roles(args)
    cfg = settings(args, ppo.Config, batch_size=args.batch or args.rows)
    parts, warm = [], max(1, args.rows // 16)                 # a whole step is too long for a warm-up on a big model
    if not args.warmup:
        ppo_step(args, roles, prompts[:warm], caps[:warm], cfg)
    runs = {"ours": lambda: parts.append(ppo_step(args, roles, prompts, caps, cfg))}
    if "naive" in args.against:
        padded, _ = workload(args, args.rows, "fixed")
        runs["naive"] = lambda: ppo_step(args, roles, padded, [args.new] * args.rows, cfg)
    if "trl" in args.against:
        trl = peers.ppo(roles[0].gpt, prompts, caps, cfg.batch_size, 2, 1e-5)
        runs |= {"trl": trl, "trl, its garbage collection free": lambda: trl(frozen=True)}
    tokens, (times, head) = [len(p) + c for p, c in zip(prompts, caps)], backward(args)
    flops = pass_flops(args, tokens, 0, 4 + 2 * 2 * times, 0) + pass_flops(args, [], sum(caps), 0, 2 + 2 * head)
    floor = decode_floor(args, prompts, caps) + seconds_for(args, flops)
    line(args, f"ppo {args.rows}x({args.prompt}+{args.new})", sum(tokens), floor, timed(args, runs))
    args.results[-1] |= dict(zip(("rollout_and_scoring_s", "updates_s"), parts[-1]))


def bench_memory(args):
    """The peak of memory in a PPO step with its four models, on --rows rows, all of the longest length."""
    reset(args.device)
    empty, roles = memory_in_use(args.device), ppo_roles(args)
    base = sum(w.numel() * w.element_size() for w in roles[0].gpt.weights().values())
    cfg = settings(args, ppo.Config, batch_size=args.rows)
    prompts, _ = workload(args, args.rows, "fixed")
    start = clock(args.device)
    ppo_step(args, roles, prompts, [args.new] * args.rows, cfg)
    seconds, peak = clock(args.device) - start, memory_in_use(args.device, peak=True) - empty
    reserved = torch.cuda.max_memory_reserved() if args.device == "cuda" else peak
    args.results.append({"bench": "memory", "preset": args.preset, "lora_rank": args.lora_rank, "int8": args.int8,
                         "rows": args.rows, "slots": args.slots, "micro_batch_tokens": args.micro_batch_tokens,
                         "base_gb": base / 1e9, "peak_gb": peak / 1e9, "peak_gib": peak / 2 ** 30,
                         "reserved_gib": reserved / 2 ** 30, "seconds": seconds})
    show(args, f"memory of PPO's four roles, {args.slots} slots, {args.micro_batch_tokens} tokens a micro-batch",
         f"base {base / 1e9:.2f} GB", f"peak {peak / 1e9:.2f} GB ({peak / 2 ** 30:.2f} GiB)",
         f"{reserved / 2 ** 30:.2f} GiB taken")


def bench_load(args):
    """Loading a checkpoint of two shards from the page cache: GB/s, and the peak of memory over its size."""
    ours = random_policy(args)
    weights = {name: w.cpu() for name, w in ours.gpt.weights().items()}
    bytes = sum(w.numel() * w.element_size() for w in weights.values())
    with tempfile.TemporaryDirectory() as folder:
        folder, names = Path(folder), list(weights)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in shards.items():
            write_safetensors(folder / file, {name: weights[name] for name in part})
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(families.llama_config(ours.gpt.config)))
        del ours, weights
        took = timed(args, {"ours": lambda: model.load(folder, args.device, args.dtype)})
    seconds, least, peak = took["ours"]
    args.results.append({"bench": "load", "preset": args.preset, "gb": bytes / 1e9, "seconds": seconds,
                         "seconds_min": least, "gb_per_s": bytes / 1e9 / seconds, "peak_over_size": peak / bytes})
    show(args, f"load {bytes / 1e9:.3f} GB", f"{bytes / 1e9 / seconds:.2f} GB/s",
         f"{seconds:.3f} s (least {least:.3f})", f"peak {peak / bytes:.2f} x its size")


BENCHES = {"rollout": bench_rollout, "logprob": bench_logprob, "sft": bench_sft, "dpo": bench_dpo, "ppo": bench_ppo,
           "memory": bench_memory, "load": bench_load}
NO_TIME = "no time was left"


# -- the command ---------------------------------------------------------------------------------------------------

def installed(other, bench):
    """Whether the packages are installed that this bench needs to run against `other`. TRL 1.16 and later have no PPO.
    """
    package = {"hf": "transformers", "hf_batch": "transformers", "trl": "trl"}.get(other)
    if package is None or not find_spec(package):
        return other == "naive"
    return (other, bench) != ("trl", "ppo") or find_spec("trl.experimental.ppo") is not None


def measure(args, plan):
    """Run a plan [(bench, {flag: value})]. A bench that fails is recorded in args.results with its error, and the next
    one is run."""
    began = time.perf_counter()
    for name, changes in plan:
        one = argparse.Namespace(**{**vars(args), **changes})
        one.against = [other for other in changes.get("against", args.against) if installed(other, name)]
        if time.perf_counter() - began > args.seconds:
            args.results.append({"bench": name, **changes, "error": NO_TIME})
            continue
        if str(one.dtype) not in args.ceilings:
            args.ceilings[str(one.dtype)] = ceilings(one)
        one.ceilings = args.ceilings[str(one.dtype)]
        try:
            with plainly("try a smaller --preset, fewer --rows, a lower --micro_batch_tokens"):
                BENCHES[name](one)
        except Refusal as error:
            failed(args, name, changes, error)
        except Exception as error:
            traceback.print_exc()
            failed(args, name, changes, error)
        reset(args.device)


def failed(args, name, changes, error):
    """Record the error of a bench in args.results, and print it."""
    args.results.append({"bench": name, **changes, "error": f"{type(error).__name__}: {error}"[:400]})
    print(f"{name}: {error}", file=sys.stderr)


def cuda_tests():
    """Run the tests of the code that only runs on a GPU; returns the last line of pytest, with the counts."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    tests = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    print(tests.stdout, tests.stderr, flush=True)
    return (tests.stdout + tests.stderr).strip().splitlines()[-1]


def main(argv):
    args = flags.parse(argv, __doc__, BENCHES)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).open("a").close()                # fail now, not after the benches, if it cannot be written
    args.dtype, args.ceilings, args.results = getattr(torch, args.dtype), {}, []
    cuda = args.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    document = {"machine": torch.cuda.get_device_name() if cuda else processor(), "device": args.device,
                "ceilings": args.ceilings, "python": platform.python_version(), "torch": torch.__version__,
                "against": {name: version(name) for name in ("transformers", "trl") if find_spec(name)}}
    if "h200" in args.benches:
        document["tests"] = cuda_tests()
    try:
        for name in args.benches:
            plans = {"h200": H200, "cpu": CPU + BF16 * bf16_pays(), "all": [(bench, {}) for bench in BENCHES]}
            measure(args, plans.get(name, [(name, {})]))
    finally:                                            # after Ctrl-C too, the results so far are written
        text = json.dumps({**document, "results": args.results}, default=str)      # str: of a dtype in a plan
        if args.out:
            Path(args.out).write_text(json.dumps(json.loads(text), indent=1) + "\n")
        print(text)
    if failures := [result["bench"] for result in args.results if result.get("error", NO_TIME) != NO_TIME]:
        raise Refusal(f"failed: {', '.join(failures)}; the JSON document has the reasons, and the other results")
