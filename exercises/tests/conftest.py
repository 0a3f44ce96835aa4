"""Random numbers from a seed, and for exercises/grade.py the functions of a student's folder in the place of ours."""
import os
from functools import partial

import numpy as np
import pytest
import torch

from exercises import BLANKS
from exercises.student import Student

SEED = int(os.environ.get("FARM_SEED", 0))              # the grader's
FOLDER = os.environ.get("FARM_STUDENT", "")


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(SEED)


@pytest.fixture
def rng():
    return np.random.default_rng(SEED)


@pytest.fixture(autouse=True, scope="session")
def graded():
    """Calls of the functions to be written go to the student's process, if a folder is graded."""
    if not FOLDER:
        yield
        return
    with Student(FOLDER) as student, pytest.MonkeyPatch.context() as patch:
        for blank in BLANKS.values():
            for name in (blank.function, *blank.beside):
                patch.setattr(f"{blank.module}.{name}", partial(student.call, blank.module, name))
        yield
