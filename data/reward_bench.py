"""RewardBench 2's questions: a prompt with right and wrong answers, to be told apart by a reward model.

Records {id, prompt, chosen: [text, ...], rejected: [text, ...], subset}, as in allenai/reward-bench-2 on the hub
(arXiv 2506.01937; 1,865 prompts in six subsets). There it is a Parquet file, which needs a package to be read:

    pip install datasets
    python -c "import datasets; datasets.load_dataset('allenai/reward-bench-2', split='test').to_json('rb2.jsonl')"
"""
import re

from data import InputError
from data.sets import read_records

TIES = "ties"                           # the subset in which several answers are right
TIED_ID = re.compile(r"(ref|tied):(\d+)")


def read_reward_bench(path):
    """{subset: records}. In Ties the id "ref:7" is of a prompt with one right answer, "tied:7" of one with several."""
    subsets = {}
    for i, record in enumerate(read_records(path, ("prompt", "subset"))):
        for key in ("chosen", "rejected"):
            texts = record.get(key)
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise InputError(f"{path}: row {i} has no list of texts under {key!r}")
        if is_ties(record["subset"]) and not TIED_ID.fullmatch(str(record.get("id"))):
            raise InputError(f"{path}: row {i} is of the subset Ties, and its id is not like ref:7 or tied:7, but "
                             f"{record.get('id')!r:.60}")
        subsets.setdefault(record["subset"], []).append(record)
    return subsets


def is_ties(subset):
    return subset.lower() == TIES
