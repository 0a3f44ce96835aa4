"""The flags of `python -m benchmarks`: defines and checks them."""
import argparse
import re

import torch

from benchmarks.plans import LENGTHS, SHAPES
from data import InputError, underscored

MAY_BE_ZERO = {"lora_rank", "batch", "slots", "warmup", "seconds"}
PEERS = ["naive", "hf", "hf_batch", "trl", "nothing"]


def flags(parser, cuda):
    """Add all flags to the parser, in three groups. cuda: use the defaults for a GPU."""
    def add(name, default, about, **more):
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif default is not None:
            more["type"] = type(default)
        flag = group.add_argument(f"--{name}", default=default, **more)
        # Not given to add_argument: before Python 3.13, argparse would add the default of a switch a second time.
        flag.help = f"{about} [{'none' if default == '' else default}]"

    group = parser.add_argument_group("the model")
    add("preset", "tiny", "shape of the model, see benchmarks/plans.py", choices=list(SHAPES))
    add("device", "cuda" if cuda else "cpu", "where the model runs", choices=["cpu", "cuda"])
    add("dtype", "bfloat16" if cuda else "float32", "dtype of the weights", choices=["float32", "bfloat16", "float16"])
    add("lora_rank", 16 if cuda else 0, "rank of the adapters on a frozen base; 0 trains all weights")
    add("int8", False, "keep the frozen base in int8")
    add("checkpointing", cuda, "recompute activations in the backward pass")
    add("graph", True, "on a GPU, capture decoding steps as CUDA graphs")
    add("compile", False, "compile the blocks for training")
    group = parser.add_argument_group("the work")
    add("prompt", 192 if cuda else 32, "longest prompt, in tokens")
    add("new", 300 if cuda else 96, "longest answer, in tokens")
    add("lengths", "alpaca", "distribution of the answers' lengths", choices=list(LENGTHS))
    add("prompt_lengths", "fixed", "distribution of the prompts' lengths", choices=list(LENGTHS))
    add("rows", 128 if cuda else 64, "number of answers, demonstrations or pairs")
    add("n", 1, "number of answers to each prompt")
    add("batch", 0, "answers in an optimizer step of PPO; 0: all rows")
    add("slots", 0, "answers that are sampled at the same time; 0: as many as fit")
    add("micro_batch_tokens", 4096, "tokens, padding included, in one forward and backward pass")
    add("cached", True, "DPO: compute the reference's log-probs before the step")
    add("shared_prompt", True, "DPO: compute the prompt of a pair once for both answers")
    group = parser.add_argument_group("the measurement")
    group.add_argument("--against", nargs="+", default=["naive"], choices=PEERS, metavar="OTHER",
                       help=f"what to compare with, if installed: {', '.join(PEERS)} [naive]")
    add("warmup", 1, "runs that are not timed, before the others")
    add("repeat", 1 if cuda else 5, "runs that are timed")
    add("seconds", 500., "start no further bench after this number of seconds")
    add("out", "", "file to write the JSON document to")


def parse(argv, about, benches):
    """The checked settings of a command line. about: the text above the flags in --help. benches: the names that can be
    given. InputError for settings that make no sense."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser("python -m benchmarks", usage="%(prog)s [BENCH ...] [--FLAG VALUE ...]",
                                     description=about, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", default=["all"], metavar="BENCH",
                        help=f"{', '.join(benches)}, all; or a list: h200, cpu [all]")
    flags(parser, cuda)
    args = parser.parse_args([re.sub("^--no_", "--no-", flag) for flag in underscored(argv)])
    if wrong := set(args.benches) - {*benches, "all", "h200", "cpu"}:
        raise InputError(f"unknown: {', '.join(sorted(wrong))}; choose from {', '.join(benches)}, all, h200, cpu")
    if args.device == "cuda" and not cuda:
        raise InputError("--device cuda: torch sees no GPU here")
    if args.device == "cpu" and "h200" in args.benches:
        raise InputError("h200 is a list for a GPU: choose cpu, or single benches")
    if args.dtype != "float32" and not args.lora_rank and not {"rollout", "logprob", "load"}.issuperset(args.benches):
        raise InputError(f"--dtype {args.dtype} would round small updates of the weights away: give --lora_rank 16")
    for name, value in vars(args).items():
        least = 0 if name in MAY_BE_ZERO else 1
        if type(value) in (int, float) and not least <= value < 1 << 31:
            raise InputError(f"--{name} {value} makes no sense: it must be {least} or more")
    if args.rows % args.n:
        raise InputError(f"--rows {args.rows} is no multiple of --n {args.n}, the answers to each prompt")
    if args.int8 and not args.lora_rank:
        raise InputError("--int8 freezes all weights, so there must be adapters to train: give --lora_rank 16")
    return args
