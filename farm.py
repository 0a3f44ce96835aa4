"""Learning from simulated human feedback, on one machine.

    python farm.py --method dpo                       all that dpo needs, then dpo, then the leaderboard
    python farm.py --method dpo --help                its knobs
    python farm.py --method dpo --beta 0.2 --sft.epochs 3 --out runs/mine

A method is a file in rlhf/. Stages that it needs run first; finished ones are reused. Everything is written to --out.
"""
import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, fields
from pathlib import Path

# Read when torch loads: a thread that waits for the others spins for a tenth of a millisecond, and only then sleeps.
# Without that two threads are hardly faster than one; spinning three times as long, the default, only heats the room.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")


import annotate  # noqa: E402
import eval  # noqa: E402
from data import InputError, run, sets  # noqa: E402
from data.text import read_json  # noqa: E402
from rlhf import config, methods, policy  # noqa: E402
from rlhf.update import peak_gb, plainly  # noqa: E402


def load(name):
    """Method `dpo` is the file rlhf/dpo.py: NEEDS, Config and run(cfg) are all that it has."""
    if name not in methods():
        raise InputError(f"unknown method {name!r}; choose from {', '.join(methods())}")
    return importlib.import_module(f"rlhf.{name}")


def route(argv, name):
    """{stage: {field: value}}: `--sft.lr 1e-3` is for sft, everything else for the method `name`."""
    routed, stage = {name: []}, name
    for token in argv:
        if match := re.match(r"--(\w+)\.(.+)", token):
            stage, token = match[1], f"--{match[2]}"
        elif token.startswith("--"):
            stage = name
        routed.setdefault(stage, []).append(token)
    return {stage: config.parse(load(stage).Config, flags, f"farm.py --method {stage}")
            for stage, flags in routed.items()}


def plan(name):
    """The stages that `name` needs, in order, and itself."""
    order = [stage for need in load(name).NEEDS for stage in plan(need)]
    return list(dict.fromkeys([*order, name]))


def stage(name, cfg, binding, ids):
    """Run one stage, or reuse it if it is finished and the settings named in `binding` agree; returns its id.

    An id stands for all that made a result: the settings and the ids of the stages that were needed.
    """
    module, folder = load(name), cfg.dir()
    asks = getattr(cfg, "labels", "") == "judge"    # who judges is no setting of a stage that asks nobody
    elsewhere = config.ELSEWHERE if asks else config.ELSEWHERE | {"judge", "pool"}
    settings = {k: v for k, v in asdict(cfg).items() if k not in elsewhere} | {"revision": cfg.revision}
    needs = {need: ids[need] for need in module.NEEDS}
    id = hashlib.sha256(json.dumps([settings, needs], sort_keys=True).encode()).hexdigest()[:16]
    there = read_json(folder / "config.json")
    if there and not {"id", "needs"} <= there.keys():
        raise InputError(f"{folder} holds something else than a stage of a run: choose another --out")
    if (folder / "result.json").exists():
        differ = [f"{k} is {there.get(k)!r} there and {settings[k]!r} here" for k in settings
                  if (k in binding or k == "revision") and there.get(k) != settings[k]]
        differ += [f"its {need} has been made anew since" for need in needs if there["needs"].get(need) != needs[need]]
        if differ:
            raise InputError(f"{folder} is finished with other settings ({'; '.join(differ)}): choose another --out, "
                             "or delete that folder to run it again")
        print(f"== {name}: finished, reused from {folder}")
        return there["id"]

    if there and there["id"] != id:                 # what an interrupted run with other settings left behind
        shutil.rmtree(folder)
    print(f"== {name}: {module.__doc__.splitlines()[0]}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "config.part"                   # a kill must not leave half a config.json
    part.write_text(json.dumps({**config.provenance(cfg), "needs": needs, "id": id}, indent=1))
    part.replace(folder / "config.json")
    start = time.perf_counter()
    metrics = module.run(cfg)
    seconds = time.perf_counter() - start
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "metrics": metrics}, indent=1))    # last
    shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if v is not None)
    print(f"== {name}: done in {seconds:.0f} s ({shown})", flush=True)
    return id


def leaderboard(cfg):
    """Judge the answers of every finished stage in the run folder against the reference; the table as text."""
    out = Path(cfg.out)
    reference = sets.load(cfg.data, cfg.eval_data, cfg.limit)["eval"]
    models = {}
    with annotate.connect(cfg.judge, out / "judge.jsonl") as judge:
        finished = [path.parent for path in sorted(out.glob("*/result.json"))]
        for folder in (folder for folder in finished if (folder / "outputs.json").exists()):
            outputs = json.loads((folder / "outputs.json").read_text())
            models[folder.name] = eval.evaluate(outputs, reference, annotate.pool(cfg.judge, cfg.pool),
                                                 judge)
            (folder / "annotations.json").write_text(json.dumps(models[folder.name], indent=1))
    result = eval.report(models, reference, baseline="sft" if "sft" in models else "",
                         barn=models if cfg.data == "barn" else ())
    return eval.write(result, out)


def main(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    args, rest = parser.parse_known_args(argv)
    if not args.method and {"-h", "--help"} & set(rest):
        return print(f"{__doc__}\nMethods: {', '.join(methods())}.")
    if not args.method:
        raise InputError(f"which method? --method {', '.join(methods())}; --method NAME --help lists its knobs")
    given = route(rest, args.method)
    stages = plan(args.method)
    if stray := given.keys() - set(stages):
        raise InputError(f"{args.method} does not need {', '.join(stray)}, so its flags would change nothing")
    for name, flags in given.items():
        if name != args.method and (whole := flags.keys() & config.WHOLE_RUN):
            raise InputError(f"--{name}.{min(whole)} makes no sense: all stages of a run share it")
    common = {f.name for f in fields(config.Config)}
    shared = {k: v for k, v in given[args.method].items() if k in common}
    configs = {name: config.build(load(name).Config, {**shared, **given.get(name, {})}) for name in stages}
    cfg, start = configs[args.method], time.perf_counter()
    if getattr(configs.get("pairs"), "labels", "judge") != "judge":
        sets.preferences(configs["pairs"].labels)
    sets.load(cfg.data, cfg.eval_data, cfg.limit)   # what is wrong with the files or with the judge shows now,
    if cfg.judge != "none":
        with annotate.connect(cfg.judge, Path(cfg.out) / "judge.jsonl") as judge:   # not after an hour of training
            if not all((each.dir() / "result.json").exists() for each in configs.values()):
                judge.knock()

    ids = {}
    for name in stages:                             # a stage that is only needed may have been tuned by its own command
        binding = asdict(configs[name]) if name == args.method else common | given.get(name, {}).keys()
        ids[name] = stage(name, configs[name], binding, ids)
    if cfg.merge:
        merged = policy.merge(cfg)
        print(f"the adapter, merged into its base: {merged}" if merged else f"{cfg.dir()} has no adapter to merge")
    if cfg.judge == "none":
        said = f"answers that nobody has judged are in {cfg.dir()}: eval.py has them judged, serve.py lets you ask"
    else:
        said = (f"win rate over the reference answers in %, judge {cfg.judge}, temperature {cfg.temperature:g}:\n\n"
                f"{leaderboard(cfg)}")
    print(f"\n{said}\n\n{time.perf_counter() - start:.0f} s, {peak_gb():.2f} GB; everything is in {cfg.out}")


def plain(argv):
    """main(), and what may go wrong in it said in a sentence."""
    with plainly("finished stages are kept. Try, in this order: a lower --micro_batch_tokens, --checkpointing, fewer "
                 "--slots, a lower --max_new_tokens, --int8 (with adapters), a smaller model"):
        main(argv)


if __name__ == "__main__":
    run(plain, "farm.py", "finished stages are kept, and the same command goes on after them")
