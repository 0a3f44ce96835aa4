"""What a student adds is one file: methods in tests/methods use the hooks of the kit, and change nothing in it."""
import shutil
from pathlib import Path

import pytest
import torch
import toy
from methods import ppo_rule

from rlhf import grpo, logprobs, policy, reward
from rlhf.experience import schedule

torch.set_num_threads(1)
METHODS = Path(__file__).parent / "methods"
kinds = pytest.mark.parametrize("kind", toy.KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders with sft, reward and pairs."""
    return toy.run_folders(tmp_path_factory, pairs=True)


@pytest.mark.parametrize("name, most", [("ppo_rule", 25)])
def test_a_method_is_short(name, most):
    assert len((METHODS / f"{name}.py").read_text().splitlines()) <= most


# --- a reward of its own ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_ppo_against_a_rule_needs_no_reward_model(folders, tmp_path):
    folder = tmp_path / "rule"
    shutil.copytree(folders["full"], folder)
    shutil.rmtree(folder / "run" / "reward")
    cfg = toy.settings(folder, "full", ppo_rule.Config, words=2, lr=1e-2, steps=10, rollout_batch=40, batch_size=20,
                       kl_coef=0., eval_every=10, missing_eos_penalty=0.)
    metrics = ppo_rule.run(cfg)
    scores = [step["objective/scores"] for step in toy.lines(cfg)]
    assert min(scores[-3:]) > scores[0] + .1 and metrics["eval/mean_length"] > 0


# --- two hooks of a loop ---------------------------------------------------------------------------------

def test_a_variant_of_grpo_brings_its_own_advantages_and_loss(folders):
    """Whether an answer is among the better half of its group: a bonus that the loop knows nothing of."""
    def better_half(roll, cfg):
        group = roll.score.view(-1, cfg.n)
        return (group > group.median(1, keepdim=True).values).float().flatten() - .5

    def likelihood(logp, old_logp, ref_logp, advantages, mask, cfg):
        return -(advantages[:, None] * logp * mask).sum(), len(mask), logp.new_zeros(())
    cfg = toy.settings(folders["full"], "full", grpo.Config, lr=1e-2, steps=10, prompts=10, n=4, batch_size=20)
    grpo.run(cfg, toy.thirties, better_half, likelihood)
    rewards = [step["reward"] for step in toy.lines(cfg)]
    assert min(rewards[-3:]) > rewards[0] + .3, rewards


def test_every_prompt_comes_once_a_pass_and_passes_differ():
    """Five prompts a step out of seven: a step may reach into the next pass."""
    steps = schedule(list("abcdefg"), 5, 8, seed=0)
    order = sum(steps, [])
    passes = [tuple(order[i:i + 7]) for i in range(0, 35, 7)]
    assert [len(step) for step in steps] == [5] * 8
    assert all(sorted(one) == list("abcdefg") for one in passes) and len(set(passes)) == 5
    assert schedule(list("abcdefg"), 5, 8, seed=0) == steps != schedule(list("abcdefg"), 5, 8, seed=1)


@kinds
def test_a_reward_model_is_a_function_of_rows(kind, folders):
    cfg = toy.settings(folders[kind], kind, reward.Config)
    model = reward.load(cfg, policy.load(cfg, "sft"))
    rows = [([3, 4], [5, 0]), ([7], [8, 9, 9, 9, 0]), ([1] * 6, [2])]
    with torch.no_grad():
        alone = torch.cat([reward.score(model, *logprobs.pack([row])) for row in rows])
    torch.testing.assert_close(reward.scorer(model, cfg)(rows), alone, atol=1e-5, rtol=1e-5)
