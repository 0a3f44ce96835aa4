"""Learning from feedback, a file for each idea.

Reading order: sft, pairs, dpo, reward, best_of_n, expert_iteration, ppo.

A method is a file with NEEDS (what must have run before), Config (its knobs) and run(cfg) -> metrics. The kit is what
methods share; every other file here is found by its name: add one, edit nothing.
"""
from pathlib import Path

KIT = ("answers", "config", "experience", "logprobs", "policy", "sampler", "update", "writer")


def methods():
    """The names that `farm.py --method` takes."""
    return sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py") if file.stem not in KIT)
