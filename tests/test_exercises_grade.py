"""The grader: full marks for the project's own functions, none for wrong ones, and no student's code can break it."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import ROOT, command, refused
from quick import slowly

from exercises import BLANKS, blank, grade, student, trained, tree
from rlhf import plan

# Plausible wrong solutions: (blank, what is wrong, the text of the right one, the wrong one).
WRONG = [
    ("mask", "shifted by one", "[row, len(prompt) - 1:len(prompt) + len(response) - 1]",
     "[row, len(prompt):len(prompt) + len(response)]"),
    ("mask", "EOS is not learned", "len(prompt) + len(response) - 1] =", "len(prompt) + len(response) - 2] ="),
    ("bradley_terry", "the sign swapped", "logsigmoid(chosen - rejected)", "logsigmoid(rejected - chosen)"),
    ("bradley_terry", "no logarithm", "F.logsigmoid(chosen - rejected)", "torch.sigmoid(chosen - rejected)"),
    ("dpo", "no reference", "cfg.beta * (logp - ref_logp)", "cfg.beta * logp"),
    ("dpo", "means over tokens", "cfg.beta * (logp - ref_logp)", "cfg.beta * (logp - ref_logp) / lengths"),
    ("kl", "the sign swapped", "-kl_coef * kl * mask", "kl_coef * kl * mask"),
    ("kl", "the score at the end of the row", "[torch.arange(len(score), device=score.device), last_token(mask)]",
     "[:, -1]"),
    ("gae", "values after the last token", "    values = values * mask\n", ""),
    ("gae", "rewards are not discounted by lambda", "delta + gamma * lam * ahead", "delta + gamma * ahead"),
    ("whiten", "padding counts", "    mean = update.masked_mean(x, mask)\n", "    mean = x.mean()\n"),
    ("whiten", "the variance, not its root", "variance(x, mask).sqrt()", "variance(x, mask)"),
    ("clip", "the wrong side", "return (torch.max(free, clipped)", "return (torch.min(free, clipped)"),
    ("clip", "no bound for bad tokens", "clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, ",
     "clipped = -advantages * ratio, -advantages * ratio.clamp(0, "),
    ("group", "over the batch", "group.mean(1, keepdim=True)", "group.mean()"),
    ("group", "no deviation", "centred / (group.std(1, keepdim=True) + 1e-4)", "centred"),
    ("lora", "no scale", "add_product(y, F.linear(x, A), B, scale)", "add_product(y, F.linear(x, A), B, 1.)"),
    ("lora", "the layer is left out", "add_product(y, F.linear(x, A), B, scale)",
     "scale * F.linear(F.linear(x, A), B)"),
    ("length", "not beside the reference's", "np.subtract(reference_lengths, lengths, dtype=float)",
     "np.negative(lengths, dtype=float)"),
    ("length", "rows do not weigh", "residual = weight * (p - y)", "residual = np.ones_like(weight) * (p - y)"),
]


def copy_of(folder):
    for path in tree.files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def spoil(folder, wrong):
    name, _, right, other = wrong
    path = folder / BLANKS[name].file
    text = path.read_text()
    assert text.count(right) == 1, f"{name}: {right!r} stands in {path} {text.count(right)} times"
    path.write_text(text.replace(right, other))


@pytest.fixture(scope="module")
def own():
    """What the quick grading says of the project itself."""
    return command("exercises/grade.py", ROOT, "--quick", "--seed", 3)


@pytest.mark.slow
def test_the_project_s_own_functions_get_full_marks(own):
    assert own.code == 0, own.out
    assert "60 / 60" in own.out and own.out.count("\n\n") == 1, "something is said beside the table"
    assert max(map(len, own.out.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_wrong_functions_fail_their_own_tests(tmp_path, which):
    """One wrong solution for every function in one tree: each fails by itself."""
    folder, wrongs = copy_of(tmp_path), {name: None for name in BLANKS}
    for wrong in WRONG:
        if not wrongs[wrong[0]] or which:
            wrongs[wrong[0]] = wrong
    for wrong in wrongs.values():
        spoil(folder, wrong)
    rows = grade.property_tests(folder, 0, tmp_path)
    for row, wrong in zip(rows, wrongs.values()):
        assert (row.what, row.points) == (wrong[0], 0), f"{wrong[:2]} gets full marks"
        assert row.why and "Error" not in row.why, f"{wrong[:2]}: {row.why}"


@pytest.mark.slow
def test_a_blank_is_told_from_a_wrong_function_and_fails_nothing_else(tmp_path):
    folder, other = copy_of(tmp_path / "copy"), ["data/barn/base/config.json", "rlhf/update.py"]
    for name in ("gae", "length"):
        blank.take_out(BLANKS[name], folder)
    for file, more in ((other[0], " "), (other[1], "import math\n"), ("rlhf/dpo.py", "# a comment changes nothing\n")):
        (folder / file).write_text(more + (ROOT / file).read_text())
    result = command("exercises/grade.py", folder, "--quick", "--json", tmp_path / "table.json")
    assert result.code == 1 and "40 / 60" in result.out
    assert " ".join(result.out.split()).endswith(f"differ from this project, but also {', '.join(other)}.")
    assert max(map(len, result.out.splitlines())) <= 80
    table = json.loads((tmp_path / "table.json").read_text())
    found = {row["what"]: row for row in table["rows"]}
    assert (table["points"], table["of"], table["changed"]) == (40, 60, other)
    assert {name for name, row in found.items() if row["found"] == "blank"} == {"gae", "length"}
    assert (found["gae"]["points"], found["clip"]["points"]) == (0, 5)
    assert "fit() in stats/length.py is yours to write" in found["LC: points away from ours"]["why"]


def test_mistakes_are_one_sentence(tmp_path):
    refused(command("exercises/grade.py", tmp_path / "none"), 2, "there is no folder .*none")
    refused(command("exercises/grade.py", tmp_path), 2, "is no copy of the project: it has no eval.py")
    refused(command("exercises/grade.py", ROOT, "--seed", -1), 2, "--seed is a number from 0 up")


def test_without_pytest_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(grade, "find_spec", lambda name: None)
    with pytest.raises(grade.InputError, match="need pytest: pip install pytest"):
        grade.main([str(ROOT)])


# ---- a student's process ----------------------------------------------------------------------------------

HOSTILE = '''
import os, sys, torch
def right(x): print("noise"); sys.stderr.write("noise"); return x + 1, {"rate": 2.5}
def hangs():
    while True: pass
def exits(): sys.exit(0)
def dies(): os._exit(0)
def kills(): os.close(3); os.close(4); os.close(5); os.close(6); return 1
def wrong(): raise KeyError("no such key")
def blank(): raise NotImplementedError("write it")
def thing(): return object()
def deep():
    x = []
    for _ in range(10 ** 5): x = [x]
    return x
def spoils(): torch.tensor = None; sys.stdout = None; os.environ.clear(); return 5
def told(): return sorted(os.environ)
'''


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile.py").write_text(HOSTILE)
    with student.Student(folder) as one:
        yield one


def test_values_come_back_as_they_were(hostile):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y, rate = hostile.call("hostile", "right", x)
    assert torch.equal(y, x + 1) and y.requires_grad and y.dtype == torch.float64 and rate == {"rate": 2.5}
    for value in (torch.tensor([[True], [False]]), torch.zeros(0, 3), torch.tensor(1.5), torch.tensor([-torch.inf])):
        again = student.decode(json.loads(json.dumps(student.encode(value))))
        assert torch.equal(again, value) and again.dtype == value.dtype and again.shape == value.shape
    array = student.decode(student.encode(np.arange(6).reshape(2, 3)))
    assert array.shape == (2, 3) and array.dtype == np.int64
    assert student.decode(student.encode(SimpleNamespace(n=2, score=[1.5]))) == SimpleNamespace(n=2, score=[1.5])


@pytest.mark.parametrize("function, said", [
    ("exits", "raises SystemExit"), slowly("dies", "ends the process"), slowly("kills", "ends the process"),
    ("wrong", "raises KeyError: 'no such key'"), ("thing", "raises TypeError"), ("deep", "raises RecursionError"),
    ("none", "raises AttributeError")])
def test_a_function_that_gives_nothing_fails_in_a_sentence_and_only_itself(hostile, function, said):
    with pytest.raises(AssertionError, match=rf"{function}\(\) {said}"):
        hostile.call("hostile", function)
    assert hostile.call("hostile", "right", 1)[0] == 2


@pytest.mark.slow
def test_a_function_that_hangs_is_stopped_and_not_asked_again(hostile, monkeypatch):
    monkeypatch.setattr(student, "LIMIT", .5)
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"hangs\(\) takes more than 0.5 seconds"):
            hostile.call("hostile", "hangs")
        monkeypatch.setattr(hostile, "start", None)     # the second time it is not called


def test_a_blank_is_told(hostile):
    with pytest.raises(NotImplementedError, match="write it"):
        hostile.call("hostile", "blank")


@pytest.mark.slow
def test_a_student_gets_no_keys(hostile, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    hostile.end()                                       # the next process begins with these
    assert not {"OPENAI_API_KEY", "HF_TOKEN"} & set(hostile.call("hostile", "told"))


@pytest.mark.parametrize("reply", [
    slowly("{}"), slowly("nonsense"), slowly(""),
    slowly('{"error": "", "blank": false, "value": {"tensor": [1], "shape": [7], "dtype": "float32"}}'),
    slowly('{"error": "", "blank": false, "value": '
           '{"tensor": [1], "shape": [1], "dtype": "object", "learns": false}}')])
def test_a_forged_reply_is_no_result(hostile, reply):
    assert hostile.call("hostile", "spoils") == 5
    hostile.stream = SimpleNamespace(write=len, flush=list, readline=lambda most: reply)
    with pytest.raises(AssertionError, match="returns no numbers"):
        hostile.call("hostile", "right", 1)


# ---- a student's trainings --------------------------------------------------------------------------------

@pytest.mark.parametrize("code, said", [
    ("pass", ""), ("import sys; print(9, file=sys.stderr); sys.exit('too bad')", "exit code 1: too bad"),
    ("raise SystemExit(3)", "exit code 3: it said nothing"),
    ("import sys\nfor _ in range(10 ** 5): sys.stderr.write('x' * 80)\nsys.exit(2)", "exit code 2: x"),
    ("while True: print('noise')", "not finished after 1 seconds")])
def test_a_command_of_a_student_s_ends_in_time_and_says_why(tmp_path, code, said):
    (tmp_path / "farm.py").write_text(code)
    limit = 1 if "while" in code else 60
    assert trained.run(tmp_path, "farm.py", limit).startswith(said)
    assert said or not trained.run(tmp_path, "farm.py", limit)


def test_instructions_are_new_and_of_the_seed():
    one, other = trained.instructions(1), trained.instructions(2)
    known = {record["instruction"] for records in trained.world.splits().values() for record in records}
    assert len(one) == trained.ASKED and not {record["instruction"] for record in one} & known
    assert one == trained.instructions(1) and one != other


def test_a_row_tells_what_went_wrong_with_a_student_s_files():
    row = grade.row_of("dpo", lambda: {}["sft"], ">= 5", lambda value, error: True)
    assert (row.points, row.found, row.why) == (0, "none", "'sft'")
    assert grade.row_of("dpo", lambda: (3., 1.), ">= 5", lambda value, error: value >= 5).points == 0
    assert grade.row_of("dpo", lambda: (7., 1.), ">= 5", lambda value, error: value >= 5).points == 10


@pytest.fixture
def tiny(monkeypatch):
    """The smallest trainings, and few instructions."""
    monkeypatch.setattr(trained, "ASKED", 24)
    line = trained.line
    monkeypatch.setattr(trained, "line", lambda *of: f"{line(*of)} --limit 24")
    monkeypatch.setitem(trained.SMALL, "reward", {"scale_answers": 24})
    monkeypatch.setitem(trained.SMALL, "ppo", {"steps": 1, "rollout_batch": 16, "val_prompts": 8})


@pytest.mark.slow
def test_all_results_of_a_whole_grading_are_numbers(tiny, tmp_path):
    rows = grade.results(ROOT, 1, tmp_path, 300)
    assert [row.what.partition(":")[0] for row in rows] == ["reward model", "dpo", "ppo", "dpo on coins"]
    assert all(np.isfinite([row.value, row.error]).all() for row in rows), [row.why for row in rows]


def test_a_dpo_that_fails_does_not_cost_ppo(monkeypatch, tmp_path):
    """PPO then gets a command of its own, with the flags that it knows."""
    lines = []

    def run(folder, line, limit):
        lines.append(line)
        return "exit code 1: broken" if "dpo" in line.split()[2] else ""
    monkeypatch.setattr(trained, "run", run)
    missing = trained.train(ROOT, tmp_path, 1, 9)
    assert [line.split()[2] for line in lines] == ["dpo,ppo", "ppo"] and "--dpo" not in lines[1]
    plan.configured(["ppo"], lines[1].split()[3:])      # raises InputError for a flag that PPO does not know
    assert missing == {"dpo": "exit code 1: broken", "coins": "exit code 1: broken", "ppo": "", "reward": ""}
    assert [row.why for row in grade.results(ROOT, 1, tmp_path, 9)][1::2] == ["exit code 1: broken"] * 2
