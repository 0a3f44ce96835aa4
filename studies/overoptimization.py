"""Over-optimisation: does more of the reward model's score become less of what people wanted, and what makes it so?

Claim. AlpacaFarm (arXiv 2305.14387, its figure of over-optimisation): with noisy annotators the win rate rises and
then falls while the score of the reward model still rises, for best-of-n and for PPO; with one consistent judge it does
not fall.

How it is measured. Proxy: the score of the reward model. Truth: the expected win rate over the reference, which is
exact in the offline world (averaged over all annotators of p_eval and both orders), and the true reward. Best-of-n: the
SFT model gives n answers to each of 400 prompts of eval, and this one pool of samples serves every reward model; a
point is the mean over all subsets of n (rlhf/best_of_n.py). The reward models learn from "noisy" labels, of which a
quarter is flipped, as in the paper, 2,000 pairs or all; from p_ann with the flips that it has here; from "clean" labels
of the same annotators, without flips, 2,000 pairs or all; from one consistent judge (p_single); and from coins, the
control. PPO: 24 steps with the noisy labels of all pairs at several kl_coef, and with those of the one judge; every 3
steps a snapshot answers the same prompts; its score and its KL are those on val. "By the one judge" is the expected win
rate if the annotator of p_single decides. Errors are standard errors over prompts, paired; they treat the trained
models as fixed.

Thresholds, fixed before seeds 2 to 4 were run (so were n = 16, 32 and 256; a peak is picked from the curve, which
flatters the fall behind it). Noisy, 2,000 pairs: rise from n = 1 to 16 over 5 errors, fall from 16 to 256 over 3.
Noisy, all pairs: fall from 32 to 256 over 2 errors. One judge, by its own verdicts: fall from the peak to 256 under 2
points. Fall from 16 to 256 of the noisy 2,000 less that of the one judge, both by p_eval: over 3 errors. PPO without
KL, noisy: peak more than 10 points over its start and more than 20 over its end.

Cost: about 22 minutes of one core for each seed from nothing: 9 for PPO, 5 for six more reward models and their pairs,
7 to sample and score 100,000 answers. --n 1024 takes four times these 7.

What would refute the claim: no fall with noisy labels, or one as large with the one judge. The paper calls the fall
hidden from one judge. Here others can be asked, too: if neither p_eval nor the true reward falls, it is not hidden but
absent. The clean rows tell whether flips, few pairs or many annotators make the fall.
"""
import json
from dataclasses import dataclass
from math import inf

import numpy as np
import torch

import annotate
import eval
from data import InputError, run_folders
from data.alpaca_eval import question
from data.barn.judge import win_probabilities
from data.barn.reward import true_reward
from rlhf import policy, reward, stages
from rlhf.answers import questions
from rlhf.best_of_n import best_of_k
from rlhf.sampler import generate
from stats import plots
from stats.tables import number, plus_minus, table
from stats.winrate import mean_and_error
from studies import kit

NOISY, MANY, USUAL, JUDGE = "noisy, 2,000", "noisy, all", "p_ann", "one judge"
LABELS = {                              # {labels: (end of the names of its stages, flags of the pairs)}
    NOISY: ("f25_n2000", "--pairs.flip .25 --pairs.max_pairs 2000"), MANY: ("f25", "--pairs.flip .25"), USUAL: ("", ""),
    "clean, 2,000": ("f0_n2000", "--pairs.flip 0 --pairs.max_pairs 2000"), "clean, all": ("f0", "--pairs.flip 0"),
    JUDGE: ("single", "--pool p_single --pairs.flip 0"), "coins": ("f50", "--pairs.flip .5")}
MEASURES = {"win_rate": "win rate by p_eval in %", "own": "win rate by the one judge in %", "truth": "true reward",
            "score": "score of the reward model", "kl": "KL to the SFT model in nats"}
TINY = {"n": 8, "prompts": 8, "steps": 2, "every": 1, "kl_coefs": "0"}      # with --quick
TINY_PPO = "--rollout_batch 16 --batch_size 16 --val_prompts 16"


@dataclass
class Config(kit.Config):
    seeds: str = "2,3,4"                # everything is trained once for each
    n: int = 256                        # answers to each prompt in the pool of samples
    prompts: int = 400                  # of eval, the first ones
    steps: int = 24                     # of PPO
    every: int = 3                      # steps between two snapshots of PPO
    kl_coefs: str = "0,.01,.05"         # of PPO with noisy labels; with the one judge it is the first one

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            vars(self).update(TINY)
        if min(self.n, self.prompts, self.steps, self.every) < 1:
            raise InputError("--n, --prompts, --steps and --every are numbers from 1 up")
        try:
            self.prices = [float(word) for word in self.kl_coefs.split(",")]
        except ValueError:
            raise InputError(f"--kl_coefs {self.kl_coefs} are no numbers: give them as in --kl_coefs 0,.05") from None
        if not all(0 <= price < inf for price in self.prices):
            raise InputError("--kl_coefs are numbers from 0 up")

    @property
    def ks(self):
        """The n of the points of a curve: powers of two, and the largest n."""
        return sorted({*(1 << i for i in range(self.n.bit_length())), self.n})


def line(method, labels, more=""):
    """The line that trains a method with these labels."""
    name, flags = LABELS[labels]
    if name:
        flags += f" --pairs.name pairs_{name} --{'reward.' * (method != 'reward')}name reward_{name}"
    return f"{method} {flags} {more}"


# -- best-of-n -----------------------------------------------------------------------------------------------------

def stored(path, made_of, make):
    """The array that make() returns, kept in a file; made again only if made_of has changed, as in kit.kept()."""
    key = stages.digest(made_of)
    if path.exists():
        with np.load(path) as before:
            if before["made_of"] == key:
                return before["array"]
    array, part = make(), path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(part, made_of=key, array=array)
    part.replace(path)
    return array


def samples(cfg, seed):
    """(records, rows [(prompt ids, response ids)], answers as texts, what they are made of): cfg.n answers of the SFT
    model to each of the first prompts of eval."""
    folder, own = kit.train(cfg, seed, "sft"), kit.configs(cfg, seed, "sft")["sft"]
    text, sft = own.text(), policy.load(own, "sft")
    records, prompts = (each[:cfg.prompts] for each in questions(sft, text, own))
    made_of = [kit.id_of(folder), stages.digest(prompts), cfg.n, own.eval_temperature, own.eval_top_p]

    def make():
        """Token ids (P * n, tokens), with -1 behind the end of an answer."""
        responses = [response for _, response in generate(sft, prompts, text, own, seed, cfg.n, judged=True)]
        ids = np.full((len(responses), max(map(len, responses))), -1, np.int32)
        for row, response in zip(ids, responses):
            row[:len(response)] = response
        return ids
    ids = stored(cfg.runs(seed) / "samples" / "answers.npz", made_of, make)
    asked = [tuple(prompt) for prompt in prompts]
    rows = [(asked[i // cfg.n], tuple(row[row >= 0].tolist())) for i, row in enumerate(ids)]
    return records, rows, [text.decode(response) for _, response in rows], made_of


def scores(cfg, seed, labels, rows, made_of):
    """Scores (P, n) of the samples by the reward model that learned from these labels."""
    folder = kit.train(cfg, seed, line("reward", labels))

    def make():
        own = kit.configs(cfg, seed, line("reward", labels))["reward"]
        different = list(dict.fromkeys(rows))           # a third of the samples are there more than once
        score = reward.scores(reward.load(own, policy.load(own, "sft")), different, own)
        score_of = dict(zip(different, score.tolist()))
        return np.array([score_of[row] for row in rows]).reshape(-1, cfg.n)
    return stored(cfg.runs(seed) / "samples" / f"{folder.name}.npz", [kit.id_of(folder), *made_of], make)


def worths(cfg, records, answers):
    """{measure: (P, answers to each prompt)}: what answers are worth. records: P of eval; answers: texts, those to one
    prompt beside each other."""
    judge, each = kit.shared(cfg).judge, len(answers) // len(records)
    asked = [question(records[i // each]) for i in range(len(answers))]
    rows = [(asked[i], answer, records[i // each]["output"]) for i, answer in enumerate(answers)]
    pools = {"win_rate": "p_eval", "own": "p_single"}
    found = {name: 100 * win_probabilities(eval.tastes_of(judge, pool), rows) for name, pool in pools.items()}
    found["truth"] = np.array([true_reward(*row[:2]) for row in rows])
    return {name: values.reshape(len(records), each) for name, values in found.items()}


def best_of_n(cfg, seed):
    """{labels: {measure: (P, points of the curve)}}: what the best of n answers is worth, by each reward model."""
    records, rows, answers, made_of = samples(cfg, seed)
    worth, found = worths(cfg, records, answers), {}
    for labels in LABELS:
        score = scores(cfg, seed, labels, rows, made_of)
        found[labels] = {name: best_of_k(torch.tensor(score), torch.tensor(values)).numpy()[:, np.array(cfg.ks) - 1]
                         for name, values in {**worth, "score": score}.items()}
    return found


# -- PPO -----------------------------------------------------------------------------------------------------------

def ppo(cfg, seed):
    """(steps of the looks, the start first, {(labels, kl_coef): {measure: (P, looks), "score" and "kl": (1, looks)}}).
    """
    sft, found = kit.train(cfg, seed, "sft"), {}
    records = kit.shared(cfg).splits()["eval"][:cfg.prompts]
    for labels, price in [*((MANY, price) for price in cfg.prices), (JUDGE, cfg.prices[0])]:
        name = f"ppo_{LABELS[labels][0]}_kl{price:g}"
        more = f"--kl_coef {price:g} --steps {cfg.steps} --eval_every {cfg.every} --snapshots --name {name}"
        folder = kit.train(cfg, seed, line("ppo", labels, f"{more} {TINY_PPO * cfg.quick}"))
        looks = [look for look in run_folders.json_lines(folder / "samples.jsonl") if "val_score" in look]
        steps = [0, *(look["step"] + 1 for look in looks)]
        files = [sft / "outputs.json", *(folder / f"outputs_{step}.json" for step in steps[1:])]
        written = [json.loads(file.read_text())[:cfg.prompts] for file in files]
        answers = [answer["output"] for of_prompt in zip(*written) for answer in of_prompt]
        # at the start both are 0: scores are scaled to mean 0 over answers of the SFT model
        of_val = {key: np.array([[0., *(look[f"val_{key}"] for look in looks)]]) for key in ("score", "kl")}
        found[labels, price] = {**worths(cfg, records, answers), **of_val}
    return steps, found


# -- what was found ------------------------------------------------------------------------------------------------

def fall(values):
    """By how much each prompt (P,) is worth less at the last point of a curve than at its peak: values (P, points)."""
    return values[:, values.mean(0).argmax()] - values[:, -1]


def checks(ks, best, trained):
    """[{what, value, error, passed}] of the thresholds of one seed. ks: the n of the points; best, trained: what
    best_of_n() and ppo() return."""
    one, some, more, most = (ks.index(min(n, ks[-1])) for n in (1, 16, 32, 256))

    def lost(labels, start, end):
        values = best[labels]["win_rate"]
        return values[:, start] - values[:, end]

    def fell(start):
        return f"fall from {ks[start]} to {ks[most]}"
    rules = [
        (f"{NOISY}: rise from n = 1 to {ks[some]}, over 5 errors", -lost(NOISY, one, some), lambda x, e: x > 5 * e),
        (f"{NOISY}: {fell(some)}, over 3 errors", lost(NOISY, some, most), lambda x, e: x > 3 * e),
        (f"{MANY}: {fell(more)}, over 2 errors", lost(MANY, more, most), lambda x, e: x > 2 * e),
        (f"{JUDGE}, by its own verdicts: fall from the peak to {ks[most]}, under 2 points",
         fall(best[JUDGE]["own"][:, :most + 1]), lambda x, e: x < 2),
        (f"{fell(some)}, {NOISY}, less that of {JUDGE}, over 3 errors",
         lost(NOISY, some, most) - lost(JUDGE, some, most), lambda x, e: x > 3 * e)]
    if (MANY, 0.) in trained:
        free = trained[MANY, 0.]["win_rate"]
        rise = free[:, free.mean(0).argmax()] - free[:, 0]
        rules += [("PPO without KL: peak over its start, over 10 points", rise, lambda x, e: x > 10),
                  ("PPO without KL: peak over its end, over 20 points", fall(free), lambda x, e: x > 20)]
    found = [(what, *mean_and_error(differences), rule) for what, differences, rule in rules]
    return [{"what": what, "value": value, "error": error, "passed": bool(rule(value, error))}
            for what, value, error, rule in found]


def rows_of(curves, axis, points, seed):
    """Rows of the CSV file: of each curve {key: {measure: (P, points)}} a row for each point."""
    rows = []
    for key, measures in curves.items():
        for i, point in enumerate(points):
            row = {"seed": seed, "curve": key, axis: point}
            for name, values in measures.items():
                row[name], error = mean_and_error(values[:, i])
                row |= {f"{name}_error": error} if error == error else {}
            rows.append(row)
    return rows


# -- tables and figures --------------------------------------------------------------------------------------------

def matrix(means, column, form, points):
    """A table with a row for each curve and a column for each point."""
    curves = list(dict.fromkeys(curve for curve, _ in means))
    return table(["", *map(str, points)], *([curve, *(number(means[curve, point][column], form) for point in points)]
                                            for curve in curves))


def fall_table(curves):
    """Peak less the last point, by each measure, of {seed: {curve: {measure: (P, points)}}}: means over the seeds."""
    lines = []
    for curve in next(iter(curves.values())):
        rate, own, (truth, error) = (
            np.mean([mean_and_error(fall(found[curve][name])) for found in curves.values()], 0)
            for name in ("win_rate", "own", "truth"))
        lines.append([curve, plus_minus(*rate, "+.1f"), plus_minus(*own, "+.1f"), f"{truth:+.2f} ± {error:.2f}"])
    return table(["", "by p_eval", "by the one judge", "true reward"], *lines)


def text_of(cfg, steps, best, trained, curves, thresholds):
    """All tables. best, trained: kit.means() of the rows of best-of-n and of PPO; curves: of both, of each seed."""
    shown = [n for n in cfg.ks if n not in (2, 8) or n == cfg.ks[-1]]
    over = f"means over {len(cfg.numbers)} seeds"
    parts = []
    for column, form in (("win_rate", ".1f"), ("score", ".2f"), ("truth", ".2f")):
        parts += [f"Best-of-n, {MEASURES[column]}, by n; {over}:", matrix(best, column, form, shown)]
    for column, form in (("win_rate", ".1f"), ("score", ".2f"), ("truth", ".2f"), ("kl", ".1f")):
        parts += [f"PPO, {MEASURES[column]}, by steps; {over}:", matrix(trained, column, form, steps)]
    parts += [f"From the peak of a curve to its end, {over}\n± standard error over prompts:", fall_table(curves),
              "Thresholds:", kit.told(thresholds)]
    return "\n\n".join(parts)


def series(means, points, x, curves):
    """{name: (x, win rate, and a band of one standard error)} of {name: curve} for plots.lines."""
    found = {}
    for name, curve in curves.items():
        rows = [means[curve, point] for point in points]
        across, level, error = (np.array([row[column] for row in rows]) for column in (x, "win_rate", "win_rate_error"))
        found[name] = across, level, level - error, level + error
    return found


def figures(cfg, steps, best, trained):
    """Win rate against n, against the score (the paper's figure), and against the steps of PPO."""
    ppos = list(dict.fromkeys(curve for curve, _ in trained))
    free = {f"PPO, {curve.removesuffix(', kl 0')}": curve for curve in ppos if curve.endswith(", kl 0")}
    score = {**series(best, cfg.ks, "score", {name: name for name in (NOISY, MANY, JUDGE)}),
             **series(trained, steps, "score", free)}
    return {
        "overoptimization": plots.lines(series(best, cfg.ks, "n", {name: name for name in LABELS}),
                                        "Best-of-n, by labels", "n", MEASURES["win_rate"], log_x=True),
        "overoptimization_score": plots.lines(score, "Over-optimisation", MEASURES["score"], MEASURES["win_rate"]),
        "overoptimization_ppo": plots.lines(series(trained, steps, "steps", {name: name for name in ppos}),
                                            "PPO, by labels and kl_coef", "steps", MEASURES["win_rate"])}


def run(cfg):
    if kit.shared(cfg).judge not in annotate.CROWDS:
        raise InputError("this study asks for the win rate of every sample, which only judges of the offline world "
                         "know: barn, barn-human, barn-far")
    rows, ppo_rows, curves, thresholds = [], [], {}, {}
    for seed in cfg.numbers:
        best, (steps, trained) = best_of_n(cfg, seed), ppo(cfg, seed)
        thresholds[seed] = checks(cfg.ks, best, trained)
        named = {f"{labels}, kl {price:g}": measures for (labels, price), measures in trained.items()}
        rows += rows_of(best, "n", cfg.ks, seed)
        ppo_rows += rows_of(named, "steps", steps, seed)
        curves[seed] = best | {f"PPO, {name}": measures for name, measures in named.items()}
    means, ppo_means = kit.means(rows, "curve", "n"), kit.means(ppo_rows, "curve", "steps")
    return kit.Result({"thresholds": thresholds, "best_of_n": rows, "ppo": ppo_rows},
                      text_of(cfg, steps, means, ppo_means, curves, thresholds),
                      {"overoptimization": rows, "overoptimization_ppo": ppo_rows},
                      figures(cfg, steps, means, ppo_means))
