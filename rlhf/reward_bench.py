"""[kit] RewardBench 2: how often does a reward model tell right from wrong?

    python -m rlhf.reward_bench runs/barn/reward rb2.jsonl

Of the answers to a prompt, the first is right, and three others are wrong.
The prompt counts 1 if the right one has the highest score, and 1/k if k
answers share it, so that chance gives 25 %. In the subset Ties several are
right; see ties_score(). The total is the mean over the subsets.

Source: arXiv 2506.01937 and its code, rewardbench 0.1.4. Left out: language
models as judges. How to get the file stands in data/reward_bench.py.
"""
import math
from statistics import fmean

import numpy as np

from data import run
from data.flags import Parser
from data.progress import Progress
from data.reward_bench import TIED_ID, is_ties, read_reward_bench
from rlhf import reward, rewards
from rlhf.update import plainly
from stats.tables import number, plus_minus, table
from stats.winrate import mean_and_error

AT_A_TIME = 32                          # prompts that are scored together


# -- scores of answers -> a score of the reward model --------------------------------------------------------------

def best_of(right, wrong):
    """What a prompt counts, from the scores of its right answers, of which the first is taken, and its wrong ones."""
    best = max(right[0], *wrong)
    return (right[0] == best) / [right[0], *wrong].count(best)


def mean(x):
    return fmean(x) if x else 0.


def ties_score(ref, tied):
    """The score of Ties: right answers should score alike, and all of them above all wrong ones.

    ref, tied: {number: (scores of right answers, scores of wrong answers)}. A question in `ref` has one right answer,
    the one of the same number in `tied` has several. The gap is the worst right score minus the best wrong one, the
    spread the best right score minus the worst. The score is
       .3 how often the gap is above 0 in tied, .3 how often it is in ref,
       .2 how often the gap in tied is larger than the spread, .2 how often the smaller gap of both is, and
       .01 the mean of tanh(smaller gap / spread - 1).
    """
    def gap(scores):
        return min(scores[0]) - max(scores[1])

    shared = [(gap(tied[n]), min(gap(tied[n]), gap(ref[n])), max(tied[n][0]) - min(tied[n][0]))
              for n in tied if n in ref and len(tied[n][0]) > 1]
    return (.3 * mean([gap(scores) > 0 for scores in tied.values()]) +
            .3 * mean([gap(scores) > 0 for scores in ref.values()]) +
            .2 * mean([own > spread for own, _, spread in shared]) +
            .2 * mean([smaller > spread for _, smaller, spread in shared]) +
            .01 * mean([math.tanh(smaller / spread - 1) for _, smaller, spread in shared if spread > 0]))


def subset_score(records, scores):
    """(score of a subset in percent, its standard error over prompts). scores: [(of right, of wrong answers)]; of Ties
    there is no error."""
    if not is_ties(records[0]["subset"]):
        return mean_and_error(np.array([100 * best_of(*of_prompt) for of_prompt in scores]))
    kinds = {"ref": {}, "tied": {}}
    for record, of_prompt in zip(records, scores):
        kind, n = TIED_ID.fullmatch(record["id"]).groups()
        kinds[kind][n] = of_prompt
    return 100 * ties_score(**kinds), math.nan


# -- the command ---------------------------------------------------------------------------------------------------

def scored(model, records):
    """[(scores of the right answers, scores of the wrong answers)] of records, by a rewards.ReadyMade."""
    found, progress = [], Progress(f"reward_bench: {records[0]['subset']}", len(records))
    for start in range(0, len(records), AT_A_TIME):
        some = records[start:start + AT_A_TIME]
        scores = iter(model.scores([model.tokens({"instruction": record["prompt"]}, text)
                                    for record in some for text in record["chosen"] + record["rejected"]]).tolist())
        found += [tuple([next(scores) for _ in record[key]] for key in ("chosen", "rejected")) for record in some]
        progress.update(len(found))
    progress.close()
    return found


def main(argv):
    parser = Parser("rlhf.reward_bench", __doc__)
    parser.add("reward", help="a reward model: a stage of a run, a folder, or a name on the hub")
    parser.add("file", help="RewardBench 2 as .jsonl or .json")
    parser.add("--device", default="", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse(argv)
    subsets = read_reward_bench(args.file)
    reward.examined(args.reward)
    with plainly("try --device cpu"):
        model = rewards.ReadyMade(rewards.Config(reward=args.reward, device=args.device))
        rows = {subset: subset_score(records, scored(model, records)) for subset, records in subsets.items()}
    lines = [[subset, str(len(subsets[subset])), plus_minus(*row)] for subset, row in rows.items()]
    total = number(mean([score for score, _ in rows.values()]), ".1f")
    print(table(["subset", "prompts", "score"], *lines, ["mean", "", total]))


if __name__ == "__main__":
    run(main, "rlhf.reward_bench", "nothing is lost")
