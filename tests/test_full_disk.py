"""A full disk: what was there stays, the judge is not asked for what cannot be stored, and the exit code is 5."""
import functools
import json
import shutil
import subprocess
import sys

import pytest
from commands import ROOT
from judged import make_pairs
from quick import slowly
from test_eval import annotations

resource = pytest.importorskip("resource")
KB = 1 << 10


def limited(size, script, *argv, **environment):
    """A command in a process whose files cannot be larger than `size` bytes."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    line = [sys.executable, str(ROOT / script), *map(str, argv)]
    return subprocess.run(line, preexec_fn=limit, capture_output=True, text=True, timeout=120, env=environment or None)


def full(ended):
    """The command ended because the disk is full, and said so in a sentence."""
    (sentence,) = ended.stderr.strip().splitlines()
    assert ended.returncode == 5 and "the disk is full" in sentence, (ended.returncode, ended.stderr)


def keys(path):
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("size", [slowly(1), slowly(40 * KB), 70 * KB, slowly(90 * KB)])
def test_no_answer_is_paid_for_that_cannot_be_stored(tmp_path, server, size):
    pairs = make_pairs(200)
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    line = ["annotate.py", tmp_path / "pairs.json", "--judge", "m", "--pool", "p_single", "--out", tmp_path / "a.json",
            "--cache", tmp_path / "judge.jsonl", "--workers", "4"]
    server.rule = lambda body, nth: "\n".join(f"{i}: Output (a)" for i in range(1, 6))
    where = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k"}
    full(limited(size, *line, **where))
    asked, stored = len(server.requests), keys(tmp_path / "judge.jsonl")
    assert asked == len(stored) == len(set(stored)) and asked < 40 and not (tmp_path / "a.json").exists()
    ended = subprocess.run([sys.executable, *map(str, line)], cwd=ROOT, env=where, capture_output=True, timeout=120)
    assert ended.returncode == 0 and len(server.requests) == len(keys(tmp_path / "judge.jsonl")) == 40
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".jsonl")]


LONG = """
import resource, sys
from pathlib import Path
from data.judges.cache import Cache
cache = Cache(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for key, text in (("short", "x"), ("long", "x" * 60_000), ("next", "y")):
    try:
        cache.put(key, {}, model="m", choice={"message": {"content": text}})
    except OSError as error:
        print(error.strerror)
"""


def test_of_an_answer_that_is_too_long_nothing_is_stored(tmp_path):
    path = tmp_path / "judge.jsonl"
    ended = subprocess.run([sys.executable, "-c", LONG, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("No space left on device\n", "") and keys(path) == ["short", "next"]


@pytest.mark.parametrize("size", [slowly(0), 100, slowly(900)])
def test_an_older_leaderboard_stays(tmp_path, size):
    (tmp_path / "a.json").write_text(json.dumps(annotations("m", [1., 2.] * 20)))
    line = ["eval.py", tmp_path / "a.json", "--resamples", "9", "--report", "--out", tmp_path / "out"]
    assert limited(1 << 30, *line).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "a.json").write_text(json.dumps(annotations("m", [2., 2.] * 20)))
    full(limited(size, *line))
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys() and before["report.html"] == after["report.html"]
    for name, data in after.items():
        assert data == before[name] or len(data) <= size and name != "report.json", name


@pytest.mark.slow
def test_a_run_folder_stays(tmp_path):
    line = ["farm.py", "--method", "base", "--limit", "4", "--out", tmp_path / "run"]
    full(limited(300, *line))
    assert limited(1 << 30, *line).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    full(limited(300, "farm.py", "--method", "sft", *line[3:]))
    assert all(path.read_bytes() == data for path, data in before.items() if path.name[0] != "." and data)
    assert limited(1 << 30, *line).returncode == 0


@pytest.mark.slow
def test_a_small_disk_that_others_fill(tmp_path, server):
    """A disk of 300 kB, which a process may have without being root where user namespaces are allowed."""
    (tmp_path / "pairs.json").write_text(json.dumps(make_pairs(300)))
    (tmp_path / "disk").mkdir()
    command = [sys.executable, ROOT / "annotate.py", tmp_path / "pairs.json", "--judge", "m", "--pool", "p_pairwise",
               "--out", tmp_path / "disk" / "a.json"]
    script = f"mount -t tmpfs -o size=300k none {tmp_path / 'disk'} && \"$@\"; code=$?; cp {tmp_path}/disk/* {tmp_path}"
    line = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"{script}; exit $code", "sh"]
    if not shutil.which("unshare") or subprocess.run([*line, "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("no disk can be mounted here")
    ended = subprocess.run([*line, *command], env={"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k"},
                           capture_output=True, text=True, timeout=120)
    full(ended)
    assert 0 < len(keys(tmp_path / "judge.jsonl")) == len(server.requests) < 300
