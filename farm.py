"""Learning from human feedback, on one machine.

Annotators, played by language models, say which of two answers is better; a
method learns from that; then its answers are judged beside reference answers,
and the win rate says what was learned. By default all of it happens in a small
offline world whose true reward is known, in a minute, without a GPU, a network
or a key. Flags change it to open weights, real instructions and real judges.

The stages that a method needs run first; finished ones are reused. Everything
is written to --out (runs/barn), where report.html shows it.
"""
import contextlib
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path

from data import InputError, attempt, did_you_mean, loading, run, run_folders, sets, writable
from data.progress import cut

# Read when torch loads: a thread that waits for the others spins for a tenth of a millisecond before it sleeps. Without
# spinning, two threads are hardly faster than one; the default, three times as long, is not faster either.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

with loading(__name__, "farm.py"):
    import annotate
    import eval
    from data.files import write_json
    import studies
    from rlhf import about, config, methods, plan, policy, stages
    from rlhf.update import peak_gb, plainly
    from stats import run_report
    from stats.tables import check_folder
    from studies import kit

KEPT = "finished stages are kept, and the same command goes on where this one was"


def leaderboard(cfg, said):
    """Judge the answers of every finished stage in the run folder against the reference, and write its report.html.
    said: the command. Returns the table as text."""
    out = Path(cfg.out)
    reference = sets.load(cfg.data, cfg.eval_data, cfg.limit)["eval"]
    whole, broken = stages.finished(out)
    models, folders = {}, {}
    with annotate.connect(cfg.judge, cfg.judge_cache, **annotate.options(cfg)) as judge:
        for folder in (folder for folder in whole if (folder / "outputs.json").exists()):
            try:
                outputs = eval.read_outputs(folder / "outputs.json")
                eval.matched(outputs, reference)
            except InputError as error:                 # a variant with another --limit or --eval_data
                broken.append(f"{folder.name} has no row: {error}")
                continue
            models[folder.name] = eval.evaluate(outputs, reference, annotate.pool(cfg.judge, cfg.pool), judge)
            folders[folder.name] = folder
    baseline = next((name for name in ("sft", "base") if name in models), "")
    result = eval.report(models, reference, baseline=baseline, starts=run_folders.starts_of(folders),
                         costs={name: run_folders.costs_of(folder) for name, folder in folders.items()},
                         barn=models if cfg.data == "barn" else ())
    with aside(out / "leaderboard") as folder:
        for name, records in models.items():
            write_json(folder / name, records)
            (folder / name).replace(out / name / "annotations.json")
        shown = eval.write(result, folder)
        run_report.write(folder / "report.html", cfg.out, said, result, models, [out], cfg.data == "barn")
        for file in folder.iterdir():
            file.replace(out / file.name)
    return "\n\n".join([shown, *broken])


@contextlib.contextmanager
def aside(folder):
    """A hidden folder beside `folder` for a with block, which is empty even if an earlier one was killed."""
    with stages.alone(folder):
        hidden = folder.with_name(f".{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        try:
            yield hidden
        finally:
            shutil.rmtree(hidden)


TRY = """
Try first:
  python farm.py --method dpo               the whole loop
  python eval.py --show runs/barn --n 3     answers of all its models, judged

More:
  python farm.py --method dpo,ppo --seeds 0,1    the mean over seeds
  python farm.py --method dpo --help             its flags
  python farm.py --list                          the names that flags take"""
VALUES = {                              # of flags: names, and what they are
    "reward": {"model": "the reward model of the run", "rule": "1 or 0, by what can be checked exactly",
               "true": "the hidden true reward of the offline world",
               "judge": "the annotators, beside an answer of the SFT model",
               "FILE.py:FUNCTION": "your own: (instruction, output) -> a number",
               "FOLDER, ORG/NAME": "a reward model that is there already"},
    "judge": {"MODEL": "at OPENAI_BASE_URL; or three: big,mid,small",
              "serve:PATH": "a checkpoint, served on this machine", "me": "you, on a page or in a notebook",
              "none": "nobody: answers are written and not judged"},
    "pool": {"p_eval": "thirteen annotators", "p_ann": "p_eval with flipped labels; annotate.py takes it",
             "p_single": "one annotator that sees five pairs at a time",
             "p_pairwise": "one annotator that answers with one letter", "FILE.json": "annotators of your own"},
    "data": {"barn": "the offline world", "alpaca_farm": "the paper's own, from the hub",
             "FILE": "Alpaca, HH-RLHF, UltraFeedback; .json, .jsonl, .gz"},
}


def listed(found):
    """Lines of a list {name: what it is}."""
    fill = textwrap.TextWrapper(79, initial_indent="  ", subsequent_indent=" " * 22, break_on_hyphens=False).fill
    return [fill(f"{name:<19} {what}") for name, what in found.items()]


def front():
    """What the command is, which methods and studies there are, and what to try."""
    of_methods = listed({name: about(name) for name in methods()})
    return "\n".join([__doc__, "Methods (--method NAME, several with commas, or all):", *of_methods,
                      "\nStudies (--study NAME):", *listed(studies.studies()), TRY])


def catalogue():
    """Every name that a flag takes, one in a line: for eyes, and for grep."""
    crowds = {name: f"{size} annotators of the offline world" for name, (_, size, _) in annotate.CROWDS.items()}
    presets = {name: ", ".join(f"{key} {value}" for key, value in settings.items())
               for name, settings in config.PRESETS.items()}
    found = {"method": {name: about(name) for name in methods()}, "study": studies.studies(), **VALUES,
             "judge": crowds | VALUES["judge"], "preset": presets}
    return "\n".join(cut(f"{flag:<8}{name:<21}{what}", 79) for flag, named in found.items()
                     for name, what in named.items())


def run_once(names, argv):
    """Run the methods and judge their answers. Returns the first method's Config, the leaderboard as text ("" if nobody
    judges), and what train() returned."""
    configs, starts = plan.configured(names, argv)
    cfg = configs[names[0]]
    check_folder(Path(cfg.out))
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
    writable(cfg.out)
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


def without_method(argv):
    """What a command shows that names neither a method nor a study; InputError if it wants one."""
    if not argv or {"-h", "--help"} & set(argv):
        return front()
    if "--list" in argv:
        if len(argv) > 1:
            raise InputError("--list stands alone; python farm.py --list | grep WORD finds a name")
        return catalogue()
    for word in (word.partition("=")[0] for word in argv):
        for kind, known in (("method", methods()), ("study", studies.studies())):
            if word in known:
                raise InputError(f"{word} is a {kind}: give --{kind} {word}")
        if word != "--method" and (meant := did_you_mean(word, ["--method", "--study"])):
            raise InputError(f"{word} is not known{meant}")
    raise InputError(f"which method? --method {', '.join(methods())}; --list says what they are, --method NAME --help "
                     "lists the flags of one")


def command(argv):
    parser = config.Parser("farm.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--study", nargs="?", const="")
    args, rest = parser.parse_known_args(argv)
    if args.study == "":
        raise InputError(f"which study? --study {', '.join(studies.studies())}; --list says what they are")
    if args.study:
        return kit.command(args.study, rest)
    parser.add_argument("--method", nargs="?")
    parser.add_argument("--seeds", default="")
    args, rest = parser.parse_known_args(argv)
    if not args.method:
        return print(without_method(argv))
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
