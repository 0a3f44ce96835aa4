"""What a checkpoint writes: `python model.py CHECKPOINT "prompt"`, so that one can look before training, and after."""
import argparse
import sys

from data import InputError, underscored
from data.text import Text
from rlhf.policy import read
from rlhf.rollout import sample
from rlhf.update import plainly

FORMS = {"chat": "the checkpoint's chat template", "alpaca": "AlpacaFarm's prompt", "text": "continued as it is"}


def parse(argv):
    parser = argparse.ArgumentParser(prog="model.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="a Hugging Face folder or name on the hub (org/name@revision), a PEFT adapter, a stage of a "
                           "run as in runs/barn/dpo, or barn")
    add("prompt", help="what to answer, or to continue; - reads it from standard input")
    add("--form", choices=FORMS, help="; ".join(f"{form}: {what}" for form, what in FORMS.items())
        + " [chat if there is a template, alpaca for what was trained here, else text]")
    add("--n", type=int, default=1, help="answers [1]")
    add("--temperature", type=float, default=1., help="0: always the likeliest token [1]")
    add("--max_new_tokens", type=int, default=0, help="longest answer [300, or a run's own; as the context allows]")
    add("--seed", type=int, default=0, help="of the random numbers [0]")
    add("--device", default="", help="cpu or cuda [cuda where there is one]")
    add("--dtype", default="", help="float32, bfloat16 or float16 [what suits the machine]")
    add("--int8", action="store_true", help="keep the linear layers in int8: half the memory, a little rounding")
    args = parser.parse_args(underscored(argv))
    numbers = args.max_new_tokens, args.temperature, args.seed
    if args.n < 1 or not all(0 <= number < 1 << 63 for number in numbers):
        raise InputError("--n is at least 1; --max_new_tokens, --temperature and --seed are not negative")
    return args


def ask(text, form, prompt):
    """Token ids of a prompt in this form."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8") from None
    if form == "text":
        return text.plain(prompt)
    if form == "chat" and not text.template:
        raise InputError(f"{text.folder}: there is no chat template: choose --form alpaca or text")
    if form == "alpaca":
        text.template = None
    return text.prompt({"instruction": prompt})


def main(argv):
    args = parse(argv)
    with plainly("try fewer --n, a lower --max_new_tokens, --int8"):
        policy, cfg, settings = read(args.checkpoint, args.device, args.int8, args.dtype)
        text, trained = Text(*cfg.words), policy.role or settings
        form = args.form or ("chat" if text.template else "alpaca" if trained else "text")
        ids = ask(text, form, sys.stdin.read() if args.prompt == "-" else args.prompt)
        context = policy.gpt.config.max_position_embeddings
        if not 0 < len(ids) < context:
            raise InputError(f"the prompt has {len(ids)} tokens, and {args.checkpoint} knows {context} positions")
        longest = min(context - len(ids), args.max_new_tokens or settings.get("max_new_tokens", cfg.max_new_tokens))
        rows = sample(policy, [ids], text.stops, longest, args.temperature, args.seed, args.n)
    for i, (_, response) in enumerate(rows, 1):
        print(f"[{i}] " * (args.n > 1) + text.decode(response))
