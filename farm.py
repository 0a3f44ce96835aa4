"""Learning from simulated human feedback, on one machine.

    python farm.py --method dpo             all that dpo needs, then dpo itself
    python farm.py --method dpo --help      its knobs
    python farm.py --method dpo,ppo         several methods; all: all of them
    python farm.py --method dpo --seeds 0,1       the mean over seeds
    python farm.py --study ranking          a claim of the paper, checked

The stages that a method needs run first; finished ones are reused. Then all
answers in the run folder are judged. --sft.epochs 3 is a flag of a stage that
is needed. Everything is written to --out.
"""
import json
import os
import re
import shlex
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from data import InputError, attempt, did_you_mean, loading, run, run_folders, sets

# Read when torch loads: a thread that waits for the others spins for a tenth of a millisecond before it sleeps. Without
# spinning, two threads are hardly faster than one; the default, three times as long, is not faster either.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

with loading(__name__, "farm.py"):
    import annotate
    import eval
    from data.weights import write_whole
    import studies
    from rlhf import about, config, methods, plan, policy, stages
    from rlhf.update import peak_gb, plainly
    from stats import run_report
    from studies import kit

KEPT = "finished stages are kept, and the same command goes on after them"


def leaderboard(cfg, said):
    """Judge the answers of every finished stage in the run folder against the reference, and write its report.html.
    said: the command. Returns the table as text."""
    out = Path(cfg.out)
    reference = sets.load(cfg.data, cfg.eval_data, cfg.limit)["eval"]
    whole, broken = stages.finished(out)
    models, folders = {}, {}
    with annotate.connect(cfg.judge, cfg.judge_cache, **annotate.options(cfg)) as judge:
        for folder in (folder for folder in whole if (folder / "outputs.json").exists()):
            outputs = json.loads((folder / "outputs.json").read_text())
            try:
                eval.matched(outputs, reference)
            except InputError as error:                 # a variant with another --limit or --eval_data
                broken.append(f"{folder.name} has no row: {error}")
                continue
            models[folder.name] = eval.evaluate(outputs, reference, annotate.pool(cfg.judge, cfg.pool), judge)
            folders[folder.name] = folder
            write_whole(folder / "annotations.json", [json.dumps(models[folder.name], indent=1).encode()])
    baseline = next((name for name in ("sft", "base") if name in models), "")
    result = eval.report(models, reference, baseline=baseline, starts=run_folders.starts_of(folders),
                         costs={name: run_folders.costs_of(folder) for name, folder in folders.items()},
                         barn=models if cfg.data == "barn" else ())
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as aside:
        shown = eval.write(result, Path(aside))
        run_report.write(Path(aside) / "report.html", cfg.out, said, result, models, [out], cfg.data == "barn")
        for file in Path(aside).iterdir():
            file.replace(out / file.name)
    return "\n\n".join([shown, *broken])


def listed(found):
    """Lines of a list {name: what it is}."""
    fill = textwrap.TextWrapper(79, initial_indent="  ", subsequent_indent=" " * 20, break_on_hyphens=False).fill
    return [fill(f"{name:<17} {what}") for name, what in found.items()]


def front():
    """What the command is, and which methods and studies there are."""
    return "\n".join([__doc__, "Methods:", *listed({name: about(name) for name in methods()}),
                      "\nStudies:", *listed(studies.studies())])


def run_once(names, argv):
    """Run the methods and judge their answers. Returns the first method's Config, the leaderboard as text ("" if nobody
    judges), and what train() returned."""
    configs, starts = plan.configured(names, argv)
    cfg = configs[names[0]]
    with plainly("finished stages are kept. Try, in this order: a lower --micro_batch_tokens, --checkpointing, fewer "
                 "--slots, a lower --max_new_tokens, --int8 (with adapters), a smaller model"):
        again = plan.train(names, configs, starts)
        for method in names:
            if configs[method].merge and "merge" not in configs[method].idle():
                print(policy.merge(configs[method]))
    said = shlex.join(["python", "farm.py", "--method", ",".join(names), *argv])
    if cfg.judge == "none":
        run_report.write(Path(cfg.out) / "report.html", cfg.out, said, {}, {}, [Path(cfg.out)])
        return cfg, "", again
    return cfg, leaderboard(cfg, said), again


def run_seeds(names, argv, said):
    """run_once() with each seed, in a folder of its own below --out, then eval.main() on all. Returns the Config."""
    if not re.fullmatch(r"\d+(,\d+)*", said):
        raise InputError(f"--seeds {said} are no numbers: give them as in --seeds 0,1,2")
    configs, _ = plan.configured(names, argv)
    cfg, folders, rerun = configs[names[0]], [], []
    if cfg.judge == "none":
        raise InputError("--seeds compares verdicts, and --judge none gives none")
    if cfg.seed:
        raise InputError(f"--seed {cfg.seed} would change nothing: --seeds {said} are taken")
    outs = {seed: Path(cfg.out) / f"seed{seed}" for seed in map(int, said.split(","))}
    runs = {seed: [*argv, "--seed", str(seed), "--out", str(out), "--cache", str(cfg.judge_cache)]
            for seed, out in outs.items()}
    for flags in runs.values():                     # what is wrong with a seed shows before the first one runs
        plan.configured(names, flags)
    for seed, out in outs.items():
        print(f"seed {seed}, in {out}")
        *_, again = run_once(names, runs[seed])
        rerun.append(again)
        folders += [str(path.parent) for path in sorted(out.glob("*/annotations.json"))]
    start = "sft" if cfg.start == "sft" else "base"
    compared = ["--baseline", start] if any(Path(folder).name == start for folder in folders) else []
    typed = shlex.join(["python", "farm.py", "--method", ",".join(names), "--seeds", said, *argv])
    eval.main([*folders, "--out", cfg.out, "--report", *compared], typed)
    for again in rerun:
        again.end()
    return cfg


def command(argv):
    parser = config.Parser("farm.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--study")
    args, rest = parser.parse_known_args(argv)
    if args.study:
        return kit.command(args.study, rest)
    parser.add_argument("--method", nargs="?")
    parser.add_argument("--seeds", default="")
    args, rest = parser.parse_known_args(argv)
    if not args.method and (not argv or {"-h", "--help"} & set(rest)):
        return print(front())
    if not args.method:
        for flag in (word.partition("=")[0] for word in rest):
            if meant := did_you_mean(flag, ["--method", "--study"]):
                raise InputError(f"{flag} is not known{meant}")
        raise InputError(f"which method? --method {', '.join(methods())}; --method NAME --help lists its knobs")
    names, start = plan.chosen(args.method), time.perf_counter()
    if args.seeds:
        cfg, board = run_seeds(names, rest, args.seeds), ""
    else:
        cfg, board, again = run_once(names, rest)
        again.end()
    if board:
        top_p = f", top-p {cfg.eval_top_p:g}" * (0 < cfg.eval_temperature and cfg.eval_top_p < 1)
        print(f"\nwin rate over the reference answers in %, judge {cfg.judge}, temperature {cfg.eval_temperature:g}"
              f"{top_p}:\n\n{board}")
    elif cfg.judge == "none":
        print(f"\nanswers that nobody has judged are in {cfg.dir()}:\neval.py has them judged, serve.py lets you ask")
    memory = f", {peak_gb():.2f} GB" if peak_gb() else ""
    print(f"\n{time.perf_counter() - start:.0f} s{memory}; everything is in {cfg.out}; report.html shows it")


def main(argv=None):
    """The command as a function, for notebooks: says what went wrong in a sentence, and returns the exit code."""
    return attempt(command, sys.argv[1:] if argv is None else argv, "farm.py", KEPT)


if __name__ == "__main__":
    run(command, "farm.py", KEPT)
