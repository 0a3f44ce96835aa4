"""What a GPU does, on a pretend one, in a process of its own: to torch, that one has an accelerator."""
import subprocess
import sys

from commands import ROOT


def test_runs_on_the_pretend_card():
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_card.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
