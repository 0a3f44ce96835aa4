"""Studies: one file for each claim of the paper, and for each comparison that a reader would ask for.

    python farm.py --study NAME [--seeds 0,1,2] [--quick] [--results] [flags of stages]

A study is a file that has Config (its flags, a dataclass on kit.Config) and run(cfg) -> kit.Result at its top level. It
is found by its name: add a file, edit nothing. Its docstring says what is claimed, how it is measured, how many minutes
it takes, what would refute the claim, and where the claim comes from; the first line stands in the list of farm.py.
Files without the two are the kit.

What studies share is in studies/kit.py, and this is all of it:

    cfg.numbers                         the seeds, as a list of int; cfg.quick: use the smallest settings
    cfg.folder, cfg.runs(seed)          Paths: where the study writes, and the run folder of one seed
    kit.train(cfg, seed, line)          the folder of a stage, trained with all that it needs unless that is finished.
                                        line: as after `farm.py --method`, "dpo" or "dpo --beta .2 --name dpo_b2"
    kit.start(cfg, seed)                the folder of what methods start from, sft or base
    kit.configs(cfg, seed, line)        {method: Config} of the same stages, for rlhf's functions: policy.load, ...
    kit.shared(cfg)                     the Config that all stages share: splits(), judge, pool, judge_cache
    kit.on_val(cfg)                     the same study on the split val, in a folder of its own, to choose settings on
    kit.offline(cfg)                    whether the data and all judges are the offline world's: win rates are exact
    kit.try_judge(cfg, judge)           ask a judge before an hour of work depends on it
    kit.verdicts(cfg, seed, folders, judge, pool)      {name of the stage: annotations of its answers}
    kit.rates(cfg, seed, folders, judge, pool)         {name of the stage: preferences (N,)}, in the barn exact ones
    kit.true_reward_of(folder)          the mean true reward of a stage's answers, in the barn
    kit.averaged({seed: preferences})   mean win rate, spread over seeds, standard error over prompts
    kit.means(rows, "method")           {("ppo",): {column: mean over the seeds}} of rows of a CSV file
    kit.told({seed: thresholds})        thresholds and whether they are passed, as text
    kit.seconds_of(folder)              what a stage took
    kit.kept(path, made_of, make)       the value of make(), kept as JSON; made again only if made_of has changed
    kit.id_of(folder)                   what identifies a finished stage, for made_of
    kit.Result(numbers, text, rows, figures)           what run() returns: it is printed and written

Stages of one --out are shared: SFT, pairs and reward model are made once for all studies; what a study trains otherwise
gets a --name. Flags that a study does not have itself go to the stages, as `--model X --data FILE --judge MODEL` or
`--sft.epochs 1`, so that it runs on real models, too. The same command continues after an interruption.

run() returns a Result. `<out>/NAME.html` shows all of it, `<out>/NAME.json` has its numbers, settings, versions, commit
and seconds, `<out>/*.csv` its rows, `<out>/*.svg` its figures. --results writes the .json and .svg files to
studies/results/, too.
"""
import ast
import importlib
from pathlib import Path

from data import InputError, one_of
from rlhf import bound, parsed

FOLDER = Path(__file__).parent
PARTS = {"Config", "run"}               # of a study


def parse(path):
    """The syntax tree of a file of this folder."""
    return parsed(path.read_text(encoding="utf-8"))


def studies():
    """{name that `farm.py --study` takes: first line of its docstring}."""
    found = {}
    for path in sorted(FOLDER.glob("[a-zA-Z]*.py")):
        try:
            tree = parse(path)
        except SyntaxError:             # being written; the others can be used
            continue
        if PARTS <= bound(tree):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def load(name):
    """Study `labels` is the file studies/labels.py."""
    if name not in studies() and (FOLDER / f"{name}.py").exists():
        try:
            lacks = sorted(PARTS - bound(parse(FOLDER / f"{name}.py")))
        except SyntaxError as error:
            raise InputError(f"studies/{name}.py, line {error.lineno}: {error.msg}") from None
        raise InputError(f"studies/{name}.py is no study: it has no {' and no '.join(lacks)}")
    one_of("study", name, studies())
    return importlib.import_module(f"studies.{name}")
