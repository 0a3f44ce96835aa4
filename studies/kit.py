"""[kit] What studies share: flags, stages in a run folder for each seed, verdicts, kept measurements, result files."""
import copy
import json
import re
import shlex
import time
from dataclasses import asdict, dataclass, field, fields
from math import nan
from pathlib import Path
from statistics import mean
from typing import ClassVar

import torch

import annotate
import eval
from data import InputError, did_you_mean, read_json, writable
from data.alpaca_eval import question
from data.barn.judge import win_probabilities
from data.barn.reward import true_reward
from data.files import write_whole
from rlhf import config, plan, stages
from rlhf.update import plainly
from stats import report
from stats.seeds import mean_and_spread
from stats.tables import plain, plus_minus, write_rows
from stats.winrate import usable, win_rate
from studies import FOLDER, load

RESULTS = FOLDER / "results"            # what README's numbers come from
QUICK = {"": {"limit": 16, "max_new_tokens": 16}, "reward": {"scale_answers": 16}}      # flags of stages with --quick
OWN = {"seed": "--seeds", "name": "", "rerun": "", "merge": "", "merge_dtype": ""}      # not passed to stages
STAGES = """

Any other flag goes to all stages (--model, --data, --judge, --pool, --preset, --lora_rank, ...), or with a stage's name
in front to one of them (--sft.epochs 1). `farm.py --method NAME --help` lists them. Finished stages in --out are
reused, also those of other studies."""


@dataclass
class Config:
    """The flags that all studies have; a study's own Config adds to them."""
    out: str = "runs/studies"           # where everything goes; studies with the same one share their stages
    seeds: str = "0,1,2"                # everything is trained once for each
    quick: bool = False                 # tiny settings in a folder of their own, to see that it runs; no result
    results: bool = False               # keep the result in studies/results/, too, where README's numbers come from

    study: ClassVar[str] = ""           # the name of the study
    said: ClassVar[tuple] = ()          # the flags of the command, as they were given
    passed: ClassVar[dict] = {}         # {stage: {flag: value}} of the flags for stages; of those for all, under ""

    def __post_init__(self):
        if not re.fullmatch(r"\d+(,\d+)*", self.seeds):
            raise InputError(f"--seeds {self.seeds} are no numbers: give them as in --seeds 0,1,2")
        if self.quick and self.results:
            raise InputError("--quick gives no results that are worth keeping: leave out --results or --quick")

    @property
    def numbers(self):
        return [int(seed) for seed in dict.fromkeys(self.seeds.split(","))]

    @property
    def folder(self):
        return Path(self.out) / "quick" if self.quick else Path(self.out)

    def runs(self, seed):
        """The run folder of a seed."""
        return self.folder / f"seed{seed}"


@dataclass
class Result:
    """What a study has found."""
    numbers: dict                       # all that was measured, for NAME.json
    text: str                           # tables for the terminal
    rows: dict = field(default_factory=dict)            # {name of a CSV file: [{column: value}]}
    figures: dict = field(default_factory=dict)         # {name of an SVG file: its text}


# -- flags ---------------------------------------------------------------------------------------------------------

def parse(name, argv):
    """The Config of a study from its flags. InputError if they do not fit the study or the data."""
    module = load(name)
    parser = config.parser_for(f"farm.py --study {name}", f"{module.__doc__}{STAGES}")
    helps = config.helps(module.Config)
    for f in fields(module.Config):
        config.add_flag(parser, f, f"{helps[f.name]} [{f.default}]")
    given, rest = parser.parse_known_args(config.spelled(argv))
    cfg = module.Config(**vars(given))
    cfg.study, cfg.said, cfg.passed = name, tuple(argv), passed_on(cfg, rest, parser)
    common, people = shared(cfg), getattr(cfg, "people", None)      # errors show here, not after an hour
    if common.judge == "none":
        raise InputError("--judge none gives no verdicts, and this study needs them")
    if people == "none" or people in annotate.CROWDS and common.data != "barn":
        raise InputError(f"{people} does not judge {common.data}: who plays people? Give --people JUDGE")
    return cfg


def offline(cfg):
    """Whether this is the offline world with its own judges, whose win rates can be computed exactly."""
    common = shared(cfg)
    return common.data == "barn" and {common.judge, getattr(cfg, "people", common.judge)} <= annotate.CROWDS.keys()


def passed_on(cfg, rest, parser):
    """{stage: {flag: value}} of the flags `rest`, which the study itself does not have; those for all stages are under
    "". If the study has a --method, they may be this method's, too."""
    method = getattr(cfg, "method", "")
    common = {f.name for f in fields(config.Config)}
    known = {f.name for f in fields(plan.load(method).Config)} if method else common
    for token in rest:
        flag = re.sub("^no-", "", token[2:].partition("=")[0])
        if token.startswith("--") and "." not in flag and flag not in known - OWN.keys():
            meant = did_you_mean(flag, {*known, *(f.name for f in fields(cfg))} - OWN.keys())
            parser.error(f"--{flag} is not a flag of this study{OWN.get(flag) and f', but {OWN[flag]} is' or meant}")
    given = plan.route(rest, method)
    everywhere = {flag: value for flag, value in given[method].items() if flag in common}
    alone = {flag: value for flag, value in given[method].items() if flag not in common}
    return {**given, method: alone, "": everywhere}


# -- stages --------------------------------------------------------------------------------------------------------

def flags_for(cfg, stage):
    """{flag: value} that the command of a study gives one stage, or, under "", to all."""
    return {**(QUICK.get(stage, {}) if cfg.quick else {}), **cfg.passed.get(stage, {})}


def shared(cfg):
    """The Config that all stages of a study share."""
    return config.build(config.Config, {**flags_for(cfg, ""), "out": str(cfg.folder)})


def configs(cfg, seed, line):
    """{method: its Config} of a method and of all that it needs, in the order in which they run.

    line: as after `farm.py --method`: the method and its flags. They override the flags that the study's command passes
    on to the stages.
    """
    method, *flags = shlex.split(line)
    said = plan.route(flags, method)
    given = {stage: {**flags_for(cfg, stage), **said.get(stage, {})}
             for stage in {*QUICK, *cfg.passed, *said} - {""}}
    given[method] = {**flags_for(cfg, ""), "out": str(cfg.runs(seed)), "seed": seed, **given[method]}
    needed = plan.order(method, given)
    given = {stage: flags for stage, flags in given.items() if stage in (*needed, *said)}
    made = plan.settings(given, method, needed, [method])
    plan.name_stages(made)
    return made


def train(cfg, seed, line):
    """The folder of the stage that a line asks for (see configs), trained with all that it needs, unless it is
    finished."""
    made = configs(cfg, seed, line)
    method = list(made)[-1]
    found = plan.prepared([method], made)
    again = stages.Again(cfg.runs(seed), {})
    if any(stages.place(stage, again) for stage in found):
        print(f"\nseed {seed}: {line}", flush=True)
        plan.train([method], made, True)
    return found[-1].folder


def try_judge(cfg, judge):
    """Ask every model of a judge one question, so that what is wrong with it shows before anything is trained."""
    common = shared(cfg)
    with annotate.connect(judge, verdict_cache(cfg, cfg.numbers[0]), **annotate.options(common)) as asked:
        annotate.probe(asked, annotate.pool(judge, "p_eval"), plan.trial_pairs(common.splits()["eval"]))


def verdict_cache(cfg, seed):
    """The file of the judge's replies about finished models: --cache, or verdicts.jsonl, apart from judge.jsonl, which
    has the replies that methods are trained on."""
    return shared(cfg).cache or cfg.runs(seed) / "verdicts.jsonl"


def start(cfg, seed):
    """The folder of what methods start from: the stage sft, or base with --start base."""
    return train(cfg, seed, shared(cfg).start)


def id_of(folder):
    """What identifies the stage in a folder."""
    return config.stage(folder)["id"]


def seconds_of(folder):
    """How long a stage took, the answers to its eval split included: CPU seconds, or wall-clock seconds on a GPU."""
    result = read_json(folder / "result.json")
    return result["cpu_seconds" if uses_cpu(config.stage(folder)["device"]) else "seconds"]


def uses_cpu(device):
    """Whether --device is the CPU, as it is by default without a GPU."""
    return device == "cpu" or not torch.cuda.is_available()


def on_val(cfg):
    """The Config of the same study in the folder `val`: there the answers to the split val are judged, against its
    demonstrations. Settings are chosen on it, so that the split eval has no part in the choice."""
    other = copy.copy(cfg)
    other.out = str(Path(cfg.out) / "val")
    path = other.folder / "val.json"
    records = [{**record, "generator": "demonstration"} for record in shared(cfg).splits()["val"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    stages.write_json(path, records)
    other.passed = {**cfg.passed, "": {**cfg.passed[""], "eval_data": str(path)}}
    return other


# -- measurements --------------------------------------------------------------------------------------------------

def kept(path, made_of, make):
    """The value of make(), which JSON can hold, cached in the file `path`. made_of: all that the value depends on, as
    ids of stages and settings, in JSON's types; if it has changed, make() is called again."""
    key = stages.digest(made_of)
    before = read_json(path)
    if before.get("made_of") != key:
        before = json.loads(json.dumps({"made_of": key, "value": make()}))
        path.parent.mkdir(parents=True, exist_ok=True)
        stages.write_json(path, before)
    return before["value"]


def verdicts(cfg, seed, folders, judge="", pool=""):
    """{name of a stage: annotations of its answers, in AlpacaEval's form and in the order of the eval split}.

    folders: of finished stages that have answers. judge, pool: who is asked, if not the judge and the pool of the run.
    """
    common = shared(cfg)
    judge, pool = judge or common.judge, pool or common.pool
    reference, found = common.splits()["eval"], {}
    with annotate.connect(judge, verdict_cache(cfg, seed), **annotate.options(common)) as asked:
        for folder in folders:
            outputs = json.loads((folder / "outputs.json").read_text())
            found[folder.name] = kept(
                folder / f"verdicts_{re.sub(r'[^a-zA-Z0-9]+', '-', f'{judge} {pool}')}.json",
                [outputs, reference, judge, annotators_of(judge, pool), common.max_tokens, common.reasoning_effort,
                 common.judge_body],
                lambda outputs=outputs: eval.evaluate(outputs, reference, annotate.pool(judge, pool), asked))
    return found


def annotators_of(judge, pool):
    """What identifies a pool, for made_of: its name, or what is in its file."""
    return pool if pool in annotate.POOLS else [asdict(one) for one in annotate.pool(judge, pool)]


def rates(cfg, seed, folders, judge="", pool=""):
    """{name of a stage: preferences (N,) of its answers over the reference, from 1 to 2}, as stats.winrate takes them.

    In the offline world they are exact: 1 + the probability of a win, averaged over all annotators of the pool and both
    orders. Elsewhere they are verdicts(). Arguments as there.
    """
    common = shared(cfg)
    judge, pool = judge or common.judge, pool or common.pool
    if judge not in annotate.CROWDS:
        return {name: usable([record["preference"] for record in records])
                for name, records in verdicts(cfg, seed, folders, judge, pool).items()}
    tastes, reference, found = eval.tastes_of(judge, pool), common.splits()["eval"], {}
    for folder in folders:
        outputs = json.loads((folder / "outputs.json").read_text())
        found[folder.name] = 1 + win_probabilities(tastes, [
            (question(record), answer["output"], record["output"])
            for record, answer in zip(reference, eval.matched(outputs, reference))])
    return found


def true_reward_of(folder):
    """The mean true reward of a stage's answers, in the offline world; NaN elsewhere."""
    if config.stage(folder)["data"] != "barn":
        return nan
    outputs = json.loads((folder / "outputs.json").read_text())
    return mean(true_reward(question(answer), answer["output"]) for answer in outputs)


def averaged(preferences):
    """{seed: preferences (N,)} of a method as numbers: its mean win rate, the spread over seeds, and the mean standard
    error over prompts, in percent."""
    rows = [win_rate(p) for p in preferences.values()]
    rate, spread = mean_and_spread([row["win_rate"] for row in rows])
    return {"win_rate": rate, "spread": spread, "standard_error": mean(row["standard_error"] for row in rows),
            "by_seed": {seed: row["win_rate"] for seed, row in zip(preferences, rows)}}


def means(rows, *keys):
    """{(values of the keys): {column: mean over the seeds}} of rows, in their order; columns without numbers are left
    out."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return {group: {column: mean(row[column] for row in of) for column, value in of[0].items()
                    if isinstance(value, (int, float)) and column != "seed"} for group, of in found.items()}


def told(thresholds):
    """The thresholds of each seed as text: {seed: [{what, value, error, passed}]}. passed: None without a threshold."""
    lines = []
    for each in zip(*thresholds.values()):
        lines.append(f"{each[0]['what']}:")
        for seed, one in zip(thresholds, each):
            passed = {None: "", True: ", passed", False: ", NOT passed"}[one["passed"]]
            lines.append(f"  seed {seed}: {plus_minus(one['value'], one['error'], '+.1f')}{passed}")
    return "\n".join(lines)


# -- the command ---------------------------------------------------------------------------------------------------

def write(cfg, result, seconds):
    """Write NAME.json, NAME.html, the CSV files and the figures of a study. Returns the names of all files."""
    document = {"study": cfg.study, "quick": cfg.quick, "flags": asdict(cfg), "passed": cfg.passed, **seconds,
                "settings": config.provenance(shared(cfg)), "numbers": result.numbers}
    names = [f"{cfg.study}.json", f"{cfg.study}.html", *(f"{name}.csv" for name in result.rows),
             *(f"{name}.svg" for name in result.figures)]
    for folder in [cfg.folder, *[RESULTS] * cfg.results]:
        folder.mkdir(parents=True, exist_ok=True)
        stages.write_json(folder / f"{cfg.study}.json", plain(document))
        for name, figure in result.figures.items():
            write_whole(folder / f"{name}.svg", [figure.encode()])
    write_page(cfg, result, document)
    for name, rows in result.rows.items():
        write_rows(rows, cfg.folder / f"{name}.csv")
    return names


def write_page(cfg, result, document):
    """Write NAME.html: the claim, figures with their numbers, tables, how it was measured, settings, and the command.
    document: what is in NAME.json."""
    title, *about = re.split(r"\n\n+", (load(cfg.study).__doc__ or "").rstrip())
    claim = [part for part in about if part.startswith("Claim.")]
    shown = {name: (list(rows[0]), [list(row.values()) for row in rows]) for name, rows in result.rows.items() if rows}
    settings = {**document["flags"], **{f"{stage}.{flag}".strip("."): value for stage, flags in cfg.passed.items()
                                        for flag, value in flags.items()},
                **{key: document[key] for key in ("seconds", "cpu_seconds") if key in document},
                "commit": document["settings"]["commit"]}
    report.write(cfg.folder / f"{cfg.study}.html", title, {
        "Figures": [report.figure(svg, f"{name}.svg", *shown.get(name, ())) for name, svg in result.figures.items()],
        "Results": [report.prose("--quick: tiny settings, so these numbers mean nothing.")] * cfg.quick
        + [part for block in result.text.split("\n\n") for part in printed(block)],
        "How it is measured": [report.code(part) if part.startswith(" ") else report.prose(part)
                               for part in about if part not in claim],
        "Settings and seconds": [
            report.table(["", "value"], settings.items()),
            report.details("All settings", report.table(["", "value"], document["settings"].items()))],
        "All numbers": [report.details(f"{name}.csv", report.table(*each)) for name, each in shown.items()
                        if name not in result.figures],
        "How to make it again": [report.code(f"python farm.py --study {shlex.join([cfg.study, *cfg.said])}")],
    }, "\n\n".join(claim))


def printed(block):
    """A block of a study's text, between two blank lines, as parts of a page: prose, code, or a table of stats.tables,
    with a line of dashes below the header and at least two spaces between columns."""
    head, *lines = block.splitlines() or [""]
    if not lines or set(lines[0].strip()) != {"-"}:
        return [report.code(block) if any(line.startswith(" ") for line in lines) else report.prose(block)]
    lines = [head, *lines[1:]]
    wide = max(map(len, lines))
    lines = [line.ljust(wide) for line in lines]
    filled = "".join("x" if any(line[i] != " " for line in lines) else " " for i in range(wide))
    rows = [[line[slice(*column.span())].strip() for column in re.finditer("x( ?x)*", filled)] for line in lines]
    return [report.table(rows[0], rows[1:])]


def command(name, argv):
    """`farm.py --study NAME`: run a study, print its tables, and write its files."""
    cfg = parse(name, argv)
    writable(cfg.out)
    start, work = time.perf_counter(), time.process_time()
    with plainly("finished stages are kept: try a lower --micro_batch_tokens, fewer --slots, a smaller model"):
        result = load(name).run(cfg)
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - work}
    names = write(cfg, result, seconds)
    print(f"\n{result.text}")
    if cfg.quick:
        print("\n--quick: tiny settings, so these numbers mean nothing")
    print(f"\n{seconds['seconds']:.0f} s; {', '.join(names)} are in {cfg.folder}"
          + f", and the .json and .svg files in {RESULTS}" * cfg.results)
