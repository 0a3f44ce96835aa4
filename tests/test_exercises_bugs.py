"""Find the bug: each patch fits, its copy of the project runs, and the number that its symptom is about is another."""
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import toy
from commands import command, refused

from exercises import bugs
from exercises.tree import copy_tree
from rlhf import config, dpo, experience, grpo, logprobs, pairs, ppo, reward, sft

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
CFG = SimpleNamespace(temperature=1., micro_batch_tokens=60, shared_prompt=False, slots=8, graph=False,
                      max_new_tokens=6, missing_eos_penalty=0.)


# -- the numbers: each is 0 in the project itself ------------------------------------------------------------------

def answers_without_an_end():
    text = config.Config().text()
    _, response = text.example({"instruction": "Name two birds."}, "An owl and a hen.")
    return int(response[-1] not in text.stops)


def first_dpo_loss():
    """Its distance from log 2 on two pairs whose answers were sampled with log-probs -1 and -3: the policy still gives
    them the same."""
    made = [{"preference": preference, "logp_1": -1., "logp_2": -3.} for preference in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pairs.json").write_text(json.dumps(made))
        ref_logps = pairs.sampled_logps(SimpleNamespace(dir=lambda stage: Path(folder)))
    logps = torch.tensor([[-1., -3.], [-3., -1.]])                                       # chosen, rejected
    losses, _ = dpo.dpo_loss(logps, ref_logps, None, SimpleNamespace(beta=.1))
    return (losses - math.log(2)).abs().max().item()


def log_probs_of_a_rollout():
    """How much they differ from those that the policy gives its answers."""
    text, model = SimpleNamespace(stops=[0], thinks=False), tiny.policy(seed=1)
    roll = experience.collect(8 * [[1, 2]], text, model, tiny.policy(seed=2), lambda rows: torch.zeros(len(rows)), CFG,
                              seed=0)
    with torch.no_grad():
        return (roll.logp - logprobs.token_logps(model, roll.ids, roll.mask)).abs().max().item()


def score_beside_a_longer_answer():
    """What it changes that an answer is scored together with a longer one."""
    model = reward.fresh(tiny.policy())
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    short, long = ([1, 2], [3, 4]), ([1, 2], [5, 6, 7, 8, 9])
    with torch.no_grad():
        alone, beside = (reward.score(model, *logprobs.pack(rows))[0] for rows in ([short], [short, long]))
    return round((alone - beside).item(), 4)


def price_of_unlikely_tokens():
    """How much less the GRPO loss is where a KL above 0 has its price: tokens that are less likely than before."""
    ids, mask = logprobs.pack([([1], [2, 3, 4])])
    logp, ref = torch.full(mask.shape, -2.), torch.full(mask.shape, -1.)
    loss, free = (grpo.grpo_loss(logp, logp, ref, torch.zeros(1), mask, grpo.Config(beta=beta))[0] for beta in (1., 0.))
    return min(0., (loss - free).item())


def copy_of_an_adapter():
    """How much a copy differs from the adapter that it is a copy of."""
    model, (ids, mask) = tiny.policy("lora"), logprobs.pack([([1, 2], [3, 4, 5])])
    with torch.no_grad():
        one, other = (logprobs.token_logps(each, ids, mask) for each in (model, model.copy("policy")))
    return (one - other).abs().max().item()


def gradient_by_micro_batch():
    """How much the first gradient of SFT differs if two rows, a long and a short answer, come one at a time."""
    rows, found = list(zip(tiny.texts([1, 20]), tiny.texts([20, 1], seed=50))), []
    for tokens in (1, 10_000):
        log = toy.log(lambda metrics: found.append(metrics["grad_norm"]))
        sft.train(tiny.policy(), rows, sft.Config(epochs=1, batch_size=4, micro_batch_tokens=tokens), log)
    return round(found[0] - found[1], 3)


def score_that_is_lost():
    """What of the scores of a short and a long answer does not reach the answers."""
    _, mask = logprobs.pack([([1, 2], [3, 4]), ([1, 2], [5, 6, 7, 8, 9])])
    rewards = ppo.shape_rewards(torch.tensor([1., 1.]), torch.zeros(mask.shape), mask, .1)
    return 2 - (rewards * mask).sum().item()


NUMBERS = {1: answers_without_an_end, 2: first_dpo_loss, 3: log_probs_of_a_rollout, 4: score_beside_a_longer_answer,
           5: price_of_unlikely_tokens, 6: copy_of_an_adapter, 7: gradient_by_micro_batch,
           8: score_that_is_lost}
NEAR = 1e-5


# -- the tests -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", NUMBERS)
def test_without_a_bug_the_number_is_0(number):
    assert abs(NUMBERS[number]()) < NEAR


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_patch_changes_the_number_that_its_symptom_is_about(number, tmp_path):
    """In a copy whose every module can still be imported."""
    ended = command("exercises/bugs/__main__.py", number, "--out", tmp_path / "copy")
    assert ended.code == 0 and f"bug {number}" in ended.out, ended.err
    code = f"import farm, test_exercises_bugs as here; print('it is', here.NUMBERS[{number}]())"
    paths = (tmp_path / "copy", tmp_path / "copy" / "tests")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True,
                           timeout=120)
    assert found.returncode == 0, found.stderr
    assert abs(float(found.stdout.rpartition("it is")[2])) > 100 * NEAR


def test_there_are_eight_and_each_has_its_symptom():
    assert [*bugs.patches()] == [*NUMBERS]
    text = (ROOT / "exercises" / "BUGS.md").read_text()
    for number, path in bugs.patches().items():
        assert f"## Bug {number}" in text
        file, _ = bugs.edits(path.read_text())
        assert file not in text, "BUGS.md tells where a bug is"


def test_a_patch_changes_one_file_and_nothing_else(tmp_path):
    copy_tree(tmp_path / "copy")
    file, _ = bugs.edits(bugs.patches()[3].read_text())
    bugs.apply(3, tmp_path / "copy")
    changed = [path for path in sorted(ROOT.joinpath("rlhf").glob("*.py"))
               if path.read_text() != (tmp_path / "copy" / "rlhf" / path.name).read_text()]
    assert changed == [ROOT / file]


def test_patches_are_what_patch_and_git_read_too():
    if not shutil.which("git"):
        pytest.skip("there is no git")
    for path in bugs.patches().values():
        checked = subprocess.run(["git", "apply", "--check", path], cwd=ROOT, capture_output=True, timeout=60)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("words, said", [
    ((9,), "there is no bug 9: choose from 1 to 8"), (("three",), "invalid int"),
    ((3, "--out", "full"), "full is not empty: give another folder with --out")])
def test_what_cannot_be_is_said_in_a_sentence(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    refused(command("exercises/bugs/__main__.py", *words), 2, said)


def test_a_patch_that_does_not_fit_is_refused(tmp_path):
    file, _ = bugs.edits(bugs.patches()[3].read_text())
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("another text\n")
    with pytest.raises(bugs.InputError, match="bug3.patch does not fit this version"):
        bugs.apply(3, tmp_path)
    assert (tmp_path / file).read_text() == "another text\n"
