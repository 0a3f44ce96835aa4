"""What a GPU does, on a pretend one, in a process of its own: to torch, that one has an accelerator."""
import subprocess
import sys

import pytest
from commands import ROOT
from quick import slowly


@pytest.mark.parametrize("which", ["not slow", slowly("slow")])
def test_runs_on_the_pretend_card(which):
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, "tests/on_card.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
