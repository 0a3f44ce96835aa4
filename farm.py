"""Learning from simulated human feedback, on one machine.

    python farm.py --method dpo             all that dpo needs, then dpo itself
    python farm.py --method dpo --help      its knobs
    python farm.py --method dpo,ppo         several methods; all: all of them
    python farm.py --method dpo --seeds 0,1       the mean over seeds

The stages that a method needs run first; finished ones are reused. Then all
answers in the run folder are judged. --sft.epochs 3 is a flag of a stage that
is needed. Everything is written to --out.
"""
import importlib
import json
import os
import re
import sys
import tempfile
import textwrap
import time
from dataclasses import fields
from pathlib import Path

from data import InputError, attempt, did_you_mean, loading, one_of, run, run_folders, sets
from data.judges.person import PERSON

# Read when torch loads: a thread that waits for the others spins for a tenth of a millisecond before it sleeps. Without
# spinning, two threads are hardly faster than one; the default, three times as long, is not faster either.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

with loading(__name__, "farm.py"):
    import annotate
    import eval
    from data.weights import write_whole
    from rlhf import FOLDER, about, config, lacks, methods, policy, stages
    from rlhf.update import peak_gb, plainly

KEPT = "finished stages are kept, and the same command goes on after them"


def load(name):
    """Method `dpo` is the file rlhf/dpo.py: NEEDS, Config and run(cfg) are all that it has."""
    if name not in methods():
        if not re.fullmatch(r"[a-zA-Z]\w*", name) or not (FOLDER / f"{name}.py").exists():
            one_of("method", name, methods())
        try:
            raise InputError(f"rlhf/{name}.py is no method: it has no {' and no '.join(lacks(name))}")
        except SyntaxError as error:
            raise InputError(f"rlhf/{name}.py, line {error.lineno}: {error.msg}") from None
    return importlib.import_module(f"rlhf.{name}")


def chosen(said):
    """The methods that --method names: one, several, or all that answer."""
    if said == "all":
        return [name for name in methods() if name not in ("base", "pairs", "reward")]
    return list(dict.fromkeys(word.strip() for word in said.split(",") if word.strip())) or [said]


def refuse_single(flags, names):
    """InputError for a flag that only some of several methods know."""
    shared = {f.name for f in fields(config.Config)}
    for flag in (token[2:].partition("=")[0] for token in flags):
        for name in names:
            if flag in {f.name for f in fields(load(name).Config)} - shared:
                raise InputError(f"--{flag} is not known to all methods: give --{name}.{flag}")


def route(argv, name, names=()):
    """{stage: {field: value}}: `--sft.lr 1e-3` is for sft, everything else for the method `name`. With several methods,
    `names`, `name` is "", and everything else must be a flag that all stages share. InputError if a flag for the whole
    run or command is given to one stage."""
    routed, stage = {name: []}, name
    for token in argv:
        if match := re.match(r"--(\w+)\.(.+)", token):
            stage, token = match[1], f"--{match[2]}"
        elif token.startswith("--"):
            stage = name
        routed.setdefault(stage, []).append(token)
    given = {}
    for stage, flags in routed.items():
        about = load(stage) if stage else config
        if not stage:
            refuse_single(flags, names)
        given[stage] = config.parse(about.Config, flags, f"farm.py --method {stage or 'all'}", about.__doc__)
        if stage != name and (whole := given[stage].keys() & config.WHOLE_RUN):
            raise InputError(f"--{stage}.{min(whole)} makes no sense: all stages of a run share it")
        if stage != name and (whole := given[stage].keys() & (config.COMMAND - {"name"})):
            raise InputError(f"--{stage}.{min(whole)} makes no sense: --{min(whole)} is for the whole command")
    return given


# -- settings ------------------------------------------------------------------------------------------------------

def configure(given, name, method, names=()):
    """The Config of one stage of a command for the method `name`, or for several methods, `names`. given: what route()
    returns."""
    common = {f.name for f in fields(config.Config)} - (set() if method in names else config.COMMAND)
    shared = {key: value for key, value in given[name].items() if key in common}
    return config.build(load(method).Config, {**shared, **given.get(method, {})})


def needs(method, cfg):
    """The stages that a method needs with these settings."""
    return [need for need in load(method).NEEDS if need not in cfg.unneeded()]


def plan(name, given=None, names=()):
    """The methods that `name` needs with these flags (default: none are given), in order, and `name` itself at the end.
    If `name` is "", the same for the methods `names`."""
    given = given or {name: {}}

    def with_needs(method):
        return [*(each for need in needs(method, configure(given, name, method)) for each in with_needs(need)), method]
    return list(dict.fromkeys(each for method in names or [name] for each in with_needs(method)))


def settings(given, name, needed, names):
    """{method: its Config} of a plan for `names`; InputError about flags that make no sense."""
    if stray := given.keys() - {name, *needed}:
        needing = f"{name} does" if name else "these methods do"
        raise InputError(f"{needing} not need {', '.join(stray)}, so its flags would change nothing")
    common = {f.name for f in fields(config.Config)} - config.COMMAND
    configs = {method: configure(given, name, method, names) for method in needed}
    for method, flags in given.items():
        for flag in flags:                          # a shared flag must change something in at least one stage
            heard = [method] if method != name else needed if flag in common else names
            why = [configs[each].idle().get(flag) for each in heard]
            if all(why):
                dotted = "" if method == name else f"{method}."
                raise InputError(f"--{dotted}{flag} would change nothing: {why[-1]}")
    return configs


def configured(names, argv):
    """({method: its Config}, whether --start was given) of all that a command runs: the checkpoint itself (base), what
    the methods need, and the methods."""
    name = names[0] if len(names) == 1 else ""
    given = route(argv, name, names)
    if not name and "name" in given[name]:
        raise InputError(f"--name {given[name]['name']} is for one method: give --{names[0]}.name")
    needed, said = plan(name, given, names), given[name]
    if "base" not in needed and (said.get("start") == "base" or not PERSON.fullmatch(said.get("judge", ""))):
        needed = ["base", *needed]      # a person is not asked about base, except where training starts at it
    configs = settings(given, name, needed, names)
    name_stages(configs)
    return configs, "start" in said


def name_stages(configs):
    """Give each Config the name of its stage, and the folders of the others."""
    for method, cfg in configs.items():
        cfg.stage = cfg.name or method
        if not re.fullmatch(r"\w[\w.-]*(?<!\.new)", cfg.stage, re.ASCII):
            raise InputError(f"--name {cfg.stage} cannot be a folder's: letters, digits, _ . - are allowed")
        if cfg.stage in methods() and cfg.stage != method:
            raise InputError(f"--name {cfg.stage} is the name of another method")
    names = {method: cfg.stage for method, cfg in configs.items()}
    if len(set(names.values())) < len(names):
        raise InputError("--name: two stages have one name")
    for cfg in configs.values():
        cfg.folders = names


def methods_to_rerun(said, configs):
    """The methods that --rerun names, by their own names or by those of their stages."""
    known = {cfg.stage: method for method, cfg in configs.items()} | {method: method for method in configs}
    found = [word.strip() for word in said.split(",") if word.strip()]
    for word in found:
        one_of("--rerun", word, known)
    return {known[word] for word in found}


# -- the command ---------------------------------------------------------------------------------------------------

def leaderboard(cfg):
    """Judge the answers of every finished stage in the run folder against the reference; the table as text."""
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
        for file in Path(aside).iterdir():
            file.replace(out / file.name)
    return "\n\n".join([shown, *broken])


def front():
    """What the command is, and which methods there are."""
    listed = [textwrap.fill(f"{name:<17} {about(name)}", 79, initial_indent="  ", subsequent_indent=" " * 20)
              for name in methods()]
    return "\n".join([__doc__, "Methods:", *listed])


def prepared(names, configs):
    """The Stages of a plan in order. What is wrong with files or settings shows here, not after an hour."""
    ids, found = {}, []
    contents = stages.records_of(configs[names[0]])
    for method, cfg in configs.items():
        module = load(method)
        made_of = {need: ids[need] for need in needs(method, cfg)}
        found.append(stages.Stage(module, cfg, made_of, contents, "" if [method] == names else f"{method}."))
        ids[method] = found[-1].id
    return found


def trial_pairs(records):
    """Pairs to try a judge with: a reference answer against the reference answer to the next instruction."""
    return [{"instruction": one["instruction"], "input": one["input"], "output_1": one["output"],
             "output_2": other["output"]} for one, other in zip(records, records[1:])]


def train(names, configs, starts):
    """Run every stage of a plan that has to run. starts: whether --start was given. Returns the stages.Again of
    --rerun; the command calls its end() when everything else is done."""
    cfg = configs[names[0]]
    options, found = annotate.options(cfg), prepared(names, configs)
    if not cfg.judge:
        raise InputError(f"who judges the answers to {cfg.data}? Give --judge MODEL, serve:PATH or me, or --judge none")
    if not starts and {"base", "sft"} < set(configs) and cfg.model != "barn" and cfg.text().template:
        print(f"{cfg.model} has a chat template: --start base trains it as it is, without SFT first")
    rerun = methods_to_rerun(cfg.rerun, configs)
    again = stages.Again(cfg.out, {stage.method: stage.id for stage in found if stage.method in rerun})
    folders = [stages.place(stage, again) for stage in found]
    if cfg.judge != "none":
        with annotate.connect(cfg.judge, cfg.judge_cache, **options) as judge:
            if any(folders):
                annotate.probe(judge, annotate.pool(cfg.judge, cfg.pool), trial_pairs(cfg.splits()["eval"]))
    again.begin()
    for n, stage in enumerate(found, 1):
        stages.run(stage, again, f"stage {n} of {len(found)}")
    return again


def run_once(names, argv):
    """Run the methods and judge their answers. Returns the first method's Config, the leaderboard as text ("" if nobody
    judges), and what train() returned."""
    configs, starts = configured(names, argv)
    cfg = configs[names[0]]
    with plainly("finished stages are kept. Try, in this order: a lower --micro_batch_tokens, --checkpointing, fewer "
                 "--slots, a lower --max_new_tokens, --int8 (with adapters), a smaller model"):
        again = train(names, configs, starts)
        for method in names:
            if configs[method].merge and "merge" not in configs[method].idle():
                print(policy.merge(configs[method]))
    return cfg, "" if cfg.judge == "none" else leaderboard(cfg), again


def run_seeds(names, argv, said):
    """run_once() with each seed, in a folder of its own below --out, then eval.main() on all. Returns the Config."""
    if not re.fullmatch(r"\d+(,\d+)*", said):
        raise InputError(f"--seeds {said} are no numbers: give them as in --seeds 0,1,2")
    configs, _ = configured(names, argv)
    cfg, folders, rerun = configs[names[0]], [], []
    if cfg.judge == "none":
        raise InputError("--seeds compares verdicts, and --judge none gives none")
    if cfg.seed:
        raise InputError(f"--seed {cfg.seed} would change nothing: --seeds {said} are taken")
    outs = {seed: Path(cfg.out) / f"seed{seed}" for seed in map(int, said.split(","))}
    runs = {seed: [*argv, "--seed", str(seed), "--out", str(out), "--cache", str(cfg.judge_cache)]
            for seed, out in outs.items()}
    for flags in runs.values():                     # what is wrong with a seed shows before the first one runs
        configured(names, flags)
    for seed, out in outs.items():
        print(f"seed {seed}, in {out}")
        *_, again = run_once(names, runs[seed])
        rerun.append(again)
        folders += [str(path.parent) for path in sorted(out.glob("*/annotations.json"))]
    start = "sft" if cfg.start == "sft" else "base"
    compared = ["--baseline", start] if any(Path(folder).name == start for folder in folders) else []
    eval.main([*folders, "--out", cfg.out, *compared])
    for again in rerun:
        again.end()
    return cfg


def command(argv):
    parser = config.Parser("farm.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--method", nargs="?")
    parser.add_argument("--seeds", default="")
    args, rest = parser.parse_known_args(argv)
    if not args.method and (not argv or {"-h", "--help"} & set(rest)):
        return print(front())
    if not args.method:
        for flag in (word.partition("=")[0] for word in rest):
            if meant := did_you_mean(flag, ["--method"]):
                raise InputError(f"{flag} is not known{meant}")
        raise InputError(f"which method? --method {', '.join(methods())}; --method NAME --help lists its knobs")
    names, start = chosen(args.method), time.perf_counter()
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
    print(f"\n{time.perf_counter() - start:.0f} s{memory}; everything is in {cfg.out}")


def main(argv=None):
    """The command as a function, for notebooks: says what went wrong in a sentence, and returns the exit code."""
    return attempt(command, sys.argv[1:] if argv is None else argv, "farm.py", KEPT)


if __name__ == "__main__":
    run(command, "farm.py", KEPT)
