"""[kit] The plan of a command: which stages it needs, in which order, and with which settings."""
import importlib
import re
from dataclasses import fields

import annotate
from data import InputError, one_of, writable
from data.judges.person import PERSON
from rlhf import FOLDER, config, lacks, methods, stages


def load(name):
    """Import a method: `dpo` is rlhf/dpo.py, which has NEEDS, Config and run(cfg). InputError if it lacks one."""
    if name not in methods():
        if not re.fullmatch(r"[a-zA-Z]\w*", name) or not (FOLDER / f"{name}.py").exists():
            one_of("method", name, methods())
        try:
            raise InputError(f"rlhf/{name}.py is no method: it has no {' and no '.join(lacks(name))}")
        except SyntaxError as error:
            raise InputError(f"rlhf/{name}.py, line {error.lineno}: {error.msg}") from None
    return importlib.import_module(f"rlhf.{name}")


def chosen(said):
    """The methods that --method names: one, several with commas between them, or `all` that learn."""
    if said == "all":
        return [name for name in methods() if name not in ("base", "pairs", "reward")]
    return list(dict.fromkeys(word.strip() for word in said.split(",") if word.strip())) or [said]


# -- flags -----------------------------------------------------------------------------------------------------------

def refuse_single(flags, names):
    """InputError for a flag of single methods, where there are several: it does not say whose."""
    shared = {f.name for f in fields(config.Config)}
    for flag in (token[2:].partition("=")[0] for token in flags):
        for name in names:
            if flag in {f.name for f in fields(load(name).Config)} - shared:
                raise InputError(f"--{flag} is a flag of single methods: give --{name}.{flag}")


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


# -- settings --------------------------------------------------------------------------------------------------------

def configure(given, name, method, names=()):
    """The Config of one stage of a command for the method `name`, or for several methods, `names`. given: what route()
    returns."""
    common = {f.name for f in fields(config.Config)} - (set() if method in names else config.COMMAND)
    shared = {key: value for key, value in given[name].items() if key in common}
    return config.build(load(method).Config, {**shared, **given.get(method, {})})


def needs(method, cfg):
    """The stages that a method needs with these settings."""
    return [need for need in load(method).NEEDS if need not in cfg.unneeded()]


def order(name, given=None, names=()):
    """The methods that `name` needs with these flags (default: no flags), in the order in which they run, and `name`
    itself at the end. If `name` is "", the same for the methods `names`."""
    given = given or {name: {}}

    def with_needs(method):             # what it needs comes first
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
            takers = [method] if method != name else needed if flag in common else names
            why = [configs[each].idle().get(flag) for each in takers]
            if all(why):
                dotted = "" if method == name else f"{method}."
                raise InputError(f"--{dotted}{flag} would change nothing: {why[-1]}")
    return configs


def configured(names, argv):
    """({method: its Config}, whether --start was given) of all that a command runs: what the methods need, the methods,
    and before them the checkpoint itself (base), unless a person judges."""
    name = names[0] if len(names) == 1 else ""
    given = route(argv, name, names)
    if not name and "name" in given[name]:
        raise InputError(f"--name {given[name]['name']} is for one method: give --{names[0]}.name")
    needed, said = order(name, given, names), given[name]
    if "base" not in needed and (said.get("start") == "base" or not PERSON.fullmatch(said.get("judge", ""))):
        needed = ["base", *needed]      # a person is not asked about base, except where training starts at it
    configs = settings(given, name, needed, names)
    name_stages(configs)
    return configs, "start" in said


def name_stages(configs):
    """Set the name of each Config's stage, and tell each Config the folders of all stages. InputError if a name is not
    allowed or is used twice."""
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


# -- running it ------------------------------------------------------------------------------------------------------

def methods_to_rerun(said, configs):
    """The methods that --rerun names, by their own names or by those of their stages."""
    known = {cfg.stage: method for method, cfg in configs.items()} | {method: method for method in configs}
    found = [word.strip() for word in said.split(",") if word.strip()]
    for word in found:
        one_of("--rerun", word, known)
    return {known[word] for word in found}


def prepared(names, configs):
    """The Stages of a plan, in the order in which they run. Wrong files or settings are an InputError here, before the
    first stage runs."""
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


def train(names, configs, start_given):
    """Try the judge, then run every stage of a plan that has to run. start_given: whether --start was given. Returns
    the stages.Again of --rerun; the command calls its end() when everything else is done. InputError if nobody judges.
    """
    cfg = configs[names[0]]
    options, found = annotate.options(cfg), prepared(names, configs)
    if not cfg.judge:
        raise InputError(f"who judges the answers to {cfg.data}? Give --judge MODEL, serve:PATH or me, or --judge none")
    if not start_given and {"base", "sft"} < set(configs) and cfg.model != "barn" and cfg.text().template:
        print(f"{cfg.model} has a chat template: --start base trains it as it is, without SFT first")
    rerun = methods_to_rerun(cfg.rerun, configs)
    again = stages.Again(cfg.out, {stage.method: stage.id for stage in found if stage.method in rerun})
    folders = [stages.place(stage, again) for stage in found]
    writable(cfg.out)
    if cfg.judge != "none":
        with annotate.connect(cfg.judge, cfg.judge_cache, **options) as judge:
            if any(folders):
                annotate.probe(judge, annotate.pool(cfg.judge, cfg.pool), trial_pairs(cfg.splits()["eval"]))
    again.begin()
    for n, stage in enumerate(found, 1):
        stages.run(stage, again, f"stage {n} of {len(found)}")
    return again
