"""A course kit: functions to write, property tests that say what is missing, and a grader.

    python -m exercises.blank --list                what can be taken out, where it is, and from which paper
    python -m exercises.blank gae                   a copy of the project in ../farm-gae, without that function
    python -m pytest exercises/tests/test_gae.py    in the copy: red until the function is right
    python -m exercises.grade ../farm-gae --seed 7  a table for the teaching assistant, in two CPU minutes

How a course uses it. Students get the copy of one blank, of several, or of `all`. A blank keeps its signature and its
docstring, which together say all that is needed; everything else in the copy runs. The tests say what must hold
(invariances, closed forms, limits, tiny cases by brute force) and never how. The grader takes a student's folder,
calls the functions on numbers of its own, has models trained by the student's code, and asks these models instructions
that the student has never seen: --seed draws numbers, instructions and trainings, so results cannot be copied.

Beside other courses. These parts of their assignments can be done here, without a GPU:

    CS336, supplement on alignment    dpo, and length for the length-controlled win rate; eval.py has the win rate
    CS336, assignment 5               mask, group and clip, which are GRPO
    CMU 11-868, homework 7            bradley_terry for the reward model; kl, gae, whiten and clip for PPO. "Gibberish
                                      that scores well" becomes a number: `farm.py --study overoptimization` shows
                                      where the score goes on rising and the true reward falls, and with
                                      `farm.py --method ppo --reward true` there is no score to be fooled
    Yale CPSC 4770, homework 3        mask and dpo for DPO; lora
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Blank:
    """A function that a student writes. Its tests are exercises/tests/test_<name>.py."""
    name: str
    file: str
    function: str
    source: str                         # where it comes from
    run: str                            # what needs it: the command that shows it at work
    beside: tuple = ()                  # other functions of the file that its tests call

    @property
    def module(self):
        return self.file.removesuffix(".py").replace("/", ".")

    @property
    def tests(self):
        return f"exercises/tests/test_{self.name}.py"


BLANKS = {blank.name: blank for blank in (
    Blank("mask", "rlhf/logprobs.py", "response_mask", "which tokens are learned", "farm.py --method sft"),
    Blank("bradley_terry", "rlhf/reward.py", "bradley_terry", "2009.01325, section 3.4", "farm.py --method best_of_n"),
    Blank("dpo", "rlhf/dpo.py", "dpo_loss", "2305.18290, eq. 7", "farm.py --method dpo"),
    Blank("kl", "rlhf/ppo.py", "shape_rewards", "1909.08593, eq. 2", "farm.py --method ppo"),
    Blank("gae", "rlhf/ppo.py", "gae", "1506.02438, eq. 16", "farm.py --method ppo"),
    Blank("whiten", "rlhf/ppo.py", "whiten", "masked mean and deviation", "farm.py --method ppo"),
    Blank("clip", "rlhf/ppo.py", "policy_loss", "1707.06347, eq. 7", "farm.py --method ppo"),
    Blank("group", "rlhf/grpo.py", "group_advantages", "2402.03300, section 4.1", "farm.py --method grpo"),
    Blank("lora", "model.py", "adapted", "2106.09685, eq. 3", "farm.py --method dpo --lora_rank 16"),
    Blank("length", "stats/length.py", "fit", "2404.04475", "eval.py runs/barn", ("length_controlled",)),
)}
