"""Run folders, as farm.py leaves them: which settings made a stage, and which runs differ in the seed only.

A run folder holds a folder for each stage. In there config.json holds the settings, the `id` of what was made, and
{stage: id} of what it `needs`; annotations.json holds the verdicts on its answers, if it answers.
"""
import contextlib
from datetime import date

from data import COUNT, NUMBER, OBJECT, PATH, TEXT, InputError, check_kinds, from_json, is_number, read_json, read_text
from data.alpaca_eval import different_parts

# What may differ between runs that are averaged: the seed, where and how fast they ran, and what follows from these.
NOT_COMPARED = {"seed", "out", "name", "rerun", "cache", "device", "preset", "slots", "micro_batch_tokens",
                "checkpointing", "graph", "compile", "merge", "merge_dtype", "shared_prompt", "day", "commit",
                "versions", "id", "needs", "workers", "timeout", "max_unusable", "ask_again", "eval_data",
                "tensorboard", "save_minutes", "changed"}


def are_texts(value):
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def are_sizes(value):
    return isinstance(value, dict) and all(type(each) is int for each in value.values())


def is_date(value):
    with contextlib.suppress(ValueError, TypeError):
        return str(date.fromisoformat(value)) == value


# What config.json and result.json of a stage, and its metrics, must hold where they are read.
SETTINGS = {**dict.fromkeys(("id", "method", "start", "model", "revision", "data", "template", "device"), TEXT),
            **dict.fromkeys(("seed", "max_new_tokens", "max_thought_tokens"), COUNT), "cache": PATH,
            **dict.fromkeys(("needs", "contents", "sources"), ("texts by name", are_texts)),
            "day": ("a date, as in 2026-11-30", is_date)}
RESULT = {"seconds": NUMBER, "cpu_seconds": NUMBER, "metrics": OBJECT, "files": ("sizes by name", are_sizes)}
METRICS = {"objective/kl": ("a number", lambda value: value is None or is_number(value)), "judge/asked": COUNT}
NAMED = 3                               # how many differences between two runs a sentence names


def settings(folder):
    """The settings of a stage, {} of any other folder. InputError for settings that no stage has."""
    found = config_of(folder)
    return found if {"id", "needs", "seed"} <= found.keys() else {}


def config_of(folder):
    """The config.json in the folder of a stage, {} if there is none. InputError for one that no stage has."""
    found = read_json(folder / "config.json")
    if {"id", "needs"} <= found.keys():
        check_kinds(folder / "config.json", found, SETTINGS)
    return found


def result_of(folder):
    """What a finished stage says of itself, {} of any other folder."""
    found = {"metrics": {}, **read_json(folder / "result.json")}
    check_kinds(folder / "result.json", found, RESULT)
    check_kinds(folder / "result.json", found["metrics"], METRICS)
    return found


def named_by_run(models, where):
    """Name models of several run folders by method and run, as in "dpo (seed0)".

    models: {name: records}. where: {name: path of its annotations}. Returns ({name: records}, {name: folder of its
    stage}). If one of the models is not from a run folder, all keep the names that they have.
    """
    stages = {name: path.parent for name, path in where.items() if settings(path.parent)}
    runs = labels(stages)
    if len(runs) < 2 or len(set(stages.values())) < len(models):        # a stage has one model
        return models, stages
    names = {name: f"{folder.name} ({runs[folder.parent]})" for name, folder in stages.items()}
    return ({names[name]: records for name, records in models.items()},
            {names[name]: folder for name, folder in stages.items()})


def starts_of(stages):
    """{name: name of the model of the same run that its training started from} of {name: folder of a stage}."""
    names = {folder: name for name, folder in stages.items()}
    starts = {name: start_of(folder) for name, folder in stages.items()}
    return {name: names[start] for name, start in starts.items() if start in names and stages[name] != start}


def start_of(folder):
    """The folder of the stage from which a stage's training started: sft or a variant of it, or base, the checkpoint
    itself. The start of base is base."""
    made = settings(folder)
    if made.get("method") == "base":
        return folder
    start = "base" if made.get("method") == "sft" else made.get("start", "sft")
    return finished(folder.parent).get(made.get("needs", {}).get(start), folder.parent / start)


def finished(run):
    """{id: folder} of the finished stages in a run folder, as far as they can be read. A stage that is being made again
    (sft.new) is left out, since it has the same id as the old one."""
    found = {}
    for path in sorted(run.glob("*/result.json")):
        with contextlib.suppress(InputError):
            if result_of(path.parent) and (id := settings(path.parent).get("id")) and path.parent.suffix != ".new":
                found[id] = path.parent
    return found


def costs_of(folder):
    """What a model cost: its KL to the reference (nats per answer) and, over all stages that it needed, the CPU seconds
    (if all are known) and the labels for training that the judge was asked for. {} for what is no stage of a run.
    """
    if not (folder / "result.json").exists():
        return {}
    beside = finished(folder.parent)

    def needed(stage):
        below = [beside[id] for id in settings(stage).get("needs", {}).values() if id in beside]
        return {stage}.union(*map(needed, below))
    results = [result_of(stage) for stage in needed(folder)]
    seconds = [each["cpu_seconds"] for each in results if "cpu_seconds" in each]
    kl = result_of(folder)["metrics"].get("objective/kl")
    return {**({"cpu_seconds": sum(seconds)} if len(seconds) == len(results) else {}),
            "judge_calls": sum(each["metrics"].get("judge/asked", 0) for each in results),
            **({"kl": kl} if kl is not None else {})}


def contents(runs):
    """What the finished stages of run folders hold, for people who look: a dict for each stage, in the order in which
    stages need each other, with what is there of

    run, name       the run folder and the name of the stage
    settings        config.json;  result: result.json;  curve: curve.json of best-of-n
    metrics         [one dict a step] of metrics.jsonl;  samples: the same of samples.jsonl
    pairs           the labelled pairs of pairs.json
    """
    found = []
    for run in runs:
        beside = finished(run)
        for folder in sorted(beside.values(), key=lambda folder: (depth(folder, beside), folder.name)):
            found.append({"run": run, "name": folder.name, "settings": settings(folder), "result": result_of(folder),
                          "curve": document(folder / "curve.json", {}), "pairs": document(folder / "pairs.json", []),
                          "metrics": json_lines(folder / "metrics.jsonl"),
                          "samples": json_lines(folder / "samples.jsonl")})
    return found


def depth(folder, beside):
    """How many stages in a row a stage needed, one after the other. beside: {id: folder}."""
    needed = [beside[id] for id in settings(folder).get("needs", {}).values() if id in beside]
    return 1 + max((depth(each, beside) for each in needed), default=0)


def document(path, missing):
    """The JSON in a file; `missing` if there is no such file, or if it is something else."""
    try:
        found = from_json(path, read_text(path))
    except InputError:
        return missing
    return found if type(found) is type(missing) else missing


def json_lines(path):
    """The objects in a file of one on each line; lines that are none are left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(InputError):
            found.append(from_json(path, line))
    return [each for each in found if isinstance(each, dict)]


def in_the_barn(stages):
    """The names of the models whose instructions are the offline world's, of {name: folder of a stage}."""
    return {name for name, folder in stages.items() if settings(folder).get("data") == "barn"}


def labels(stages):
    """{run folder: the part of its path that differs from the others} of {name: folder of a stage}."""
    return different_parts(list(dict.fromkeys(folder.parent for folder in stages.values())))


def made_of(folder):
    """All settings that made a stage, but for the seed: its own, as {"beta": 0.1}, and those of the stages that it
    needed, as {"sft.lr": 0.001}."""
    own = settings(folder)
    made = {key: value for key, value in own.items() if key not in NOT_COMPARED}
    beside = {settings(path.parent).get("id"): path.parent for path in folder.parent.glob("*/config.json")}
    for stage, id in own["needs"].items():
        needed = made_of(beside[id]) if id in beside else {}
        for key, value in needed.items():
            made[key if "." in key else f"{stage}.{key}"] = value
    return made


def difference(folder, other):
    """How the settings that made a stage differ from those that made another one, as the end of a sentence."""
    ours, theirs = made_of(folder), made_of(other)
    keys = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if not keys:
        return f"have the same seed, {settings(folder)['seed']}"
    keys = [key for key in keys if key.partition(".")[2] not in keys]       # not sft.lora_rank beside lora_rank
    said = [key if isinstance(ours.get(key), dict) else f"{key} {ours.get(key)} instead of {theirs.get(key)}"
            for key in keys]
    more = [f"{len(keys) - NAMED} more"] if len(keys) > NAMED else []
    return f"differ in more than the seed ({', '.join(said[:NAMED] + more)})"


def same_but_the_seed(folders):
    """Folders of one method in groups [{seed: folder}] of equal settings and different seeds, the largest first."""
    groups = []
    for folder in folders:
        made, seed = made_of(folder), settings(folder)["seed"]
        for known, group in groups:
            if known == made and seed not in group:
                group[seed] = folder
                break
        else:
            groups.append((made, {seed: folder}))
    return sorted((group for _, group in groups), key=len, reverse=True)


def by_method(stages):
    """({method: {seed: name}}, sentences) of {name: folder of a stage}; no methods if nothing can be averaged.

    The runs of a method are equal but for the seed. If some have other settings, these are a method of their own,
    called "dpo [2]", and a sentence says how they differ from those called "dpo".
    """
    names, runs = {folder: name for name, folder in stages.items()}, labels(stages)
    methods, others = {}, {}
    for method in dict.fromkeys(folder.name for folder in names):
        groups = same_but_the_seed([folder for folder in names if folder.name == method])
        for number, group in enumerate(groups, 1):
            row = method if number == 1 else f"{method} [{number}]"
            methods[row] = {seed: names[folder] for seed, folder in group.items()}
            if number > 1:
                (one, *_), (other, *_) = group.values(), groups[0].values()
                these = ", ".join(runs[folder.parent] for folder in group.values())
                others.setdefault((these, runs[other.parent]), []).append((row, difference(one, other)))
    averaged = any(len(names) > 1 for names in methods.values())
    sentences = []
    for (these, first), rows in others.items():
        which = ", ".join(row for row, _ in rows) if averaged else "not averaged"
        sentences.append(f"{which}: {these} and {first} {rows[0][1]}")
    return methods if averaged else {}, sentences
