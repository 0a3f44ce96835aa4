"""farm.ipynb: what Colab reads of it, the outputs that are kept, and all its cells in their quickest form."""
import base64
import html
import json
import os
import re
import shutil
import sys
from types import ModuleType

import nbclient
import nbformat
import pytest
from commands import ROOT, command
from documents import NOTEBOOK, quick_cell, source

from data import notebook

CODE = {cell["id"]: cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}
REFUSED = re.compile(r"^(farm|eval|annotate|serve)\.py: |Traceback|\d+ failed", re.MULTILINE)
LIMIT = 300                             # seconds that a cell may take


def shown(cell):
    """What is printed below a cell."""
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


# ---- as it is kept -------------------------------------------------------------------------------------

def test_colab_gives_it_a_t4_and_installs_nothing():
    nbformat.validate(NOTEBOOK)
    metadata = NOTEBOOK["metadata"]
    assert (metadata["accelerator"], metadata["colab"]["gpuType"]) == ("GPU", "T4")
    assert metadata["kernelspec"]["name"] == "python3" and NOTEBOOK["nbformat_minor"] >= 5
    assert "colab-badge.svg" in source(NOTEBOOK["cells"][0])
    assert not [id for id, cell in CODE.items() if re.search(r"\b(pip|conda|apt)\b", source(cell))]


def test_it_is_a_thin_client():
    """Commands, what it imports from the project, and what is shown; the shell looks for a GPU and for Drive."""
    logic = re.compile(r"^\s*(def|class|for|while|if|with|try|lambda)\b", re.MULTILINE)
    assert not [id for id, cell in CODE.items() if logic.search(source(cell))]
    assert max(len(source(cell).splitlines()) for cell in CODE.values()) <= 6


def test_every_cell_has_run_from_top_to_bottom_without_an_error():
    assert [cell["execution_count"] for cell in CODE.values()] == list(range(1, len(CODE) + 1))
    assert not [id for id, cell in CODE.items() if not cell["outputs"]]
    assert {output["output_type"] for cell in CODE.values() for output in cell["outputs"]} <= {
        "stream", "display_data", "execute_result"}
    assert not [id for id, cell in CODE.items() if REFUSED.search(shown(cell))]
    assert re.search(r"^dpo +\d\d\.\d ± ", shown(CODE["loop"]), re.MULTILINE)
    assert "HF_TOKEN is not set" in shown(CODE["secrets"])


def test_kept_outputs_are_as_wide_as_a_terminal_and_know_no_machine():
    for id, cell in CODE.items():
        assert "execution" not in cell["metadata"] and "\r" not in shown(cell) and "\x1b" not in shown(cell)
        assert not re.search(r"tok/s|\beta \d|done in|^\d+ s, ", shown(cell), re.MULTILINE), id
        if id not in ("prompt", "reply"):               # texts of a prompt are not broken into lines
            assert max(map(len, shown(cell).splitlines()), default=0) <= 80, id


# ---- run -----------------------------------------------------------------------------------------------

class Run:
    """The notebook in a copy of the project, cell after cell, in one kernel."""

    def __init__(self, folder):
        self.folder, self.drive = folder, folder / "drive"
        self.drive.mkdir()
        self.document = nbformat.read(folder / "farm.ipynb", 4)
        self.client = nbclient.NotebookClient(self.document, timeout=LIMIT, kernel_name="python3",
                                              resources={"metadata": {"path": str(folder)}})

    def quickest(self, text):
        text = quick_cell(text).replace("nvidia-smi", "no-gpu-here")
        return text.replace("/content/drive/MyDrive", str(self.drive))

    def all(self):
        self.cells = {}
        for at, cell in enumerate(self.document.cells):
            cell.source = self.quickest(cell.source)
            if cell.cell_type == "code":
                self.cells[cell.id] = self.client.execute_cell(cell, at)
        return self

    def one(self, text):
        """What is printed below a further cell."""
        self.document.cells.append(nbformat.v4.new_code_cell(text))
        return shown(self.client.execute_cell(self.document.cells[-1], len(self.document.cells) - 1))

    def judged_by(self, name):
        """What is printed below the cell that asks the judge, with this one chosen in its form."""
        text = self.cells["me"].source
        assert text.count('"barn-human"  #') == 1
        return self.one(text.replace('"barn-human"  #', f'"{name}"  #'))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    if os.name == "nt":
        pytest.skip("the cells are commands of a POSIX shell")
    folder = tmp_path_factory.mktemp("notebook") / "farm"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "tests", "__pycache__"))
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PATH": path, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython"),
                            "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        run = Run(folder)
        with run.client.setup_kernel():
            yield run.all()


@pytest.mark.slow
def test_all_cells_run_in_their_quickest_form(ran):
    refused = {id: shown(cell) for id, cell in ran.cells.items() if REFUSED.search(shown(cell))}
    assert not refused
    rows = set(re.findall(r"^(\w+) +\d+\.\d ± ", shown(ran.cells["over"]), re.MULTILINE))
    assert rows == {"base", "sft", "dpo", "ppo", "grpo", "ppo_free"}
    assert "sft: reused" in shown(ran.cells["reward"]) and "dpo: reused" in shown(ran.cells["compare"])
    assert "Human agreement" in shown(ran.cells["agreement"]) and "Output (a)" in shown(ran.cells["prompt"])
    assert shown(ran.cells["gpu"]).strip() == "skipped: there is no GPU"
    (page,) = ran.cells["page"].outputs
    assert page.data["text/html"].startswith("<iframe srcdoc=") and page.data["text/plain"].endswith("report.html")


@pytest.mark.slow
def test_a_person_can_take_the_place_of_the_judge(ran):
    ran.one('get_ipython().kernel.raw_input = lambda asks: "b" * (" of " in asks)')
    assert ran.judged_by("me").count("Answer b:") == 20
    labels = json.loads((ran.folder / "runs" / "notebook" / "mine.json").read_text())
    assert [label["preference"] for label in labels] == [2 - label["is_switched"] for label in labels]
    assert "Human agreement" in ran.one(ran.cells["agreement"].source)
    ran.one("del get_ipython().kernel.raw_input")
    assert "annotate.py: --judge me: nobody can type an answer here" in ran.judged_by("me:anna")


@pytest.mark.slow
def test_what_was_copied_to_drive_goes_on_in_another_session(ran, tmp_path, monkeypatch):
    shutil.unpack_archive(ran.drive / "farm-runs.tgz", tmp_path)
    monkeypatch.chdir(tmp_path)
    result = command(*ran.cells["loop"].source.removeprefix("!python ").split())
    reused = re.findall(r"^(\w+): reused", result.out, re.MULTILINE)
    assert result.code == 0 and reused == ["base", "sft", "pairs", "dpo"]


# ---- what it imports -----------------------------------------------------------------------------------

def colab(monkeypatch, known):
    """Colab's module of secrets, which knows these and refuses one."""
    userdata = ModuleType("google.colab.userdata")

    def get(name):
        if name not in known:
            raise RuntimeError(f"no secret {name}")
        return known[name]

    userdata.get = get
    for name in ("google", "google.colab"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["google.colab"].userdata = userdata


def test_colab_s_secrets_reach_the_commands_and_are_not_printed(monkeypatch, capsys):
    for name in notebook.SECRETS:
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    colab(monkeypatch, {"HF_TOKEN": "hf_secret"})
    notebook.secrets()
    assert os.environ["HF_TOKEN"] == "hf_secret" and "OPENAI_API_KEY" not in os.environ
    said = capsys.readouterr().out
    assert said == "HF_TOKEN is set, OPENAI_API_KEY is not set, OPENAI_BASE_URL is not set\n"


def test_elsewhere_the_environment_stays_as_it_is(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    monkeypatch.setitem(sys.modules, "google.colab", None)
    before = dict(os.environ)
    notebook.secrets()
    assert dict(os.environ) == before and "OPENAI_API_KEY is set" in capsys.readouterr().out


def test_a_page_is_shown_whole_in_a_frame(tmp_path):
    text = base64.b64encode(bytes(range(256))).decode() + '<p title="a\'b">&amp; ± </p></iframe>'
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    framed = notebook.Page(tmp_path / "report.html")._repr_html_()
    assert html.unescape(re.fullmatch(r'<iframe srcdoc="([^"]*)" style="[^"]*"></iframe>', framed)[1]) == text
