"""Prompts and tokens: AlpacaFarm's format byte for byte, chat templates as in transformers, sandboxed."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from data import InputError
from data.barn.world import splits
from data.text import Text, read_json
from rlhf.config import BASE

torch.set_num_threads(1)
SHARED = Path(__file__).parents[2] / "shared"
STORIES, REAL = SHARED / "checkpoints" / "stories260K", SHARED / "checkpoints" / "real_configs"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason=f"needs the real tokenizers in {SHARED}")
REAL_NAMES = ("SmolLM2-135M-Instruct", "pythia-410m")

RECORDS = [{"instruction": "List two trees.", "input": "", "output": "Oak and ash."},
           {"instruction": "Add up {input}.", "input": "2\n{output}", "output": "1. two\n2. three\n\n  done"},
           {"instruction": "Say 'é😀' twice, please", "input": "", "output": "é😀 é😀"},
           {"instruction": "One word.", "input": "", "output": "y"}]


@pytest.fixture
def folder(tmp_path):
    """make(template=..., **changes of tokenizer_config.json) -> a checkpoint folder with barn's tokenizer."""
    def make(generation=None, eos_in_config=3, **changes):
        shutil.copy(BASE / "tokenizer.json", tmp_path)
        settings = {**json.loads((BASE / "tokenizer_config.json").read_text()), **changes}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos_in_config}))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path
    return make


def checkpoints():
    """Every tokenizer at hand: our own, and the real ones where they are."""
    yield BASE
    for path in (STORIES, *(REAL / name for name in REAL_NAMES)):
        yield pytest.param(path, id=path.name, marks=needs_stories)


# ---- AlpacaFarm's prompts ------------------------------------------------------------------------------

WITHOUT = (
    b"Below is an instruction that describes a task. Write a response that appropriately completes the "
    b"request.\n\n### Instruction:\nAdd up {input}.\n\n### Response:")
WITH = (
    b"Below is an instruction that describes a task, paired with an input that provides further context. "
    b"Write a response that appropriately completes the request.\n\n"
    b"### Instruction:\nAdd up {input}.\n\n### Input:\n2\n{instruction}\n\n### Response:")


def test_a_base_model_is_asked_in_alpacafarm_s_words(folder):
    text = Text(folder(chat_template=None))
    assert text.render("Add up {input}.").encode() == text.render("Add up {input}.", "").encode() == WITHOUT
    assert text.render("Add up {input}.", "2\n{instruction}").encode() == WITH


# ---- examples ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", checkpoints())
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["instruction"])
def test_an_example_is_the_prompt_and_the_output_and_one_eos(path, record):
    text = Text(path)
    prompt, response = text.example(record, record["output"])
    assert prompt == text.prompt(record)                # what the policy will be asked with
    assert text.decode(response) == record["output"]
    assert response.count(text.eos) == 1 and response[-1] == text.eos and text.eos not in prompt
    whole = text.encode(text.render(record["instruction"], record["input"]) + record["output"])
    assert text.decode(prompt + response) == text.decode(whole)


@needs_stories
def test_a_sentencepiece_prompt_begins_with_one_bos():
    text = Text(STORIES)
    bos = text.tokenizer.token_to_id("<s>")
    for record in RECORDS:
        prompt, response = text.example(record, record["output"])
        assert prompt[0] == bos and (prompt + response).count(bos) == 1


@needs_stories
@pytest.mark.parametrize("name", ["stories260K", *(f"real_configs/{name}" for name in REAL_NAMES)])
def test_prompts_are_tokenised_as_transformers_does(name):
    transformers = pytest.importorskip("transformers")
    path = SHARED / "checkpoints" / name
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        pytest.skip(f"transformers cannot load this folder: {error}")
    text = Text(path)
    for record in RECORDS:
        assert text.prompt(record) == theirs(text.render(record["instruction"], record["input"])).input_ids


def test_every_demonstration_of_the_offline_world_survives_the_round_trip():
    text = Text(BASE)
    for record in splits()["sft"][:500]:
        prompt, response = text.example(record, record["output"])
        assert text.decode(response) == record["output"]
        assert prompt == text.prompt(record) and response.count(text.eos) == 1 and len(response) < 110


def test_a_merge_across_the_seam_keeps_prompt_and_output_whole(folder):
    seams = ["{{ messages[0].content }} a", "{{ messages[0].content }} The co", "{{ messages[0].content }}"]
    for seam in seams:                                  # "co" + "w" is one token, across the seam
        text = Text(folder(chat_template=seam))
        prompt, response = text.example({"instruction": "See"}, "w eats grass.")
        assert prompt == text.prompt({"instruction": "See"}) and text.decode(response) == "w eats grass."


def test_only_prompts_that_fit_are_kept(capsys):
    text, records = Text(BASE), splits()["val"]
    lengths = [len(text.prompt(record)) for record in records]
    limit = sorted(lengths)[100]
    kept = text.fitting(records, limit)
    assert kept == [record for record, length in zip(records, lengths) if length <= limit]
    assert f"{len(records) - len(kept)} of {len(records)} prompts" in capsys.readouterr().out
    assert text.fitting(records, max(lengths)) == records and not capsys.readouterr().out
    with pytest.raises(InputError, match="no prompt has at most 2 tokens: raise --max_prompt_tokens"):
        text.fitting(records, 2)


# ---- chat templates ------------------------------------------------------------------------------------

TEMPLATES = {                                           # the offline world's, and the shapes of famous ones
    "barn": json.loads((BASE / "tokenizer_config.json").read_text())["chat_template"],
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "llama": """{{- bos_token }}
{%- if tools is defined and tools %}{{ 1/0 }}{% endif %}
{%- for m in messages %}
    {{- '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\n\n' }}
{%- endif %}
""",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_render_as_transformers_renders_them(folder, template):
    transformers = pytest.importorskip("transformers")
    path = folder(chat_template=template, bos_token="<user>")
    theirs, text = transformers.AutoTokenizer.from_pretrained(path), Text(path)
    for content in ("List two trees.", "  spaces \n\n", "{{ 7 * 7 }} {% raw %}", "é😀 <b>&amp;"):
        chat = [{"role": "user", "content": content}]
        rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text.render(content) == rendered
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert text.prompt({"instruction": content}) == ids


def test_an_input_joins_the_instruction_in_one_message():
    assert Text(BASE).render("Add up.", "2 3") == "<user>Add up.\n\n2 3<assistant>"
    assert Text(BASE).render("Add up.") == "<user>Add up.<assistant>"


def test_the_template_file_wins(folder):
    path = folder()
    (path / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    assert Text(path).render("Hi") == "[Hi]"


@pytest.mark.parametrize("attack", [
    "{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__init__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}", "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}{{ messages }}", "{{ messages[0].update(role='x') }}{{ messages[0].role }}",
    "{{ self._TemplateReference__context.environment.globals }}", "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ messages[0].content.format.__self__ }}", "{{ ''|attr('__class__') }}", "{% include '/etc/passwd' %}",
    "{% for i in range(200000) %}x{% endfor %}"])
def test_a_template_cannot_reach_python(folder, attack):
    try:
        rendered = Text(folder(chat_template=attack)).render("Hi")
    except Exception:                                   # refused; which exception it is, the next test asks
        return
    assert rendered == ""


@pytest.mark.parametrize("broken", [
    "{% for m in messages %}", "{{ nothing.at_all }}", "{{ raise_exception('No!') }}", "{{ 1 / 0 }}",
    "{{ messages[7].content }}", "{{ messages.append(1) }}", "{% include 'other' %}"])
def test_a_template_that_fails_is_an_input_error(folder, broken):
    with pytest.raises(InputError, match="chat.template"):
        Text(folder(chat_template=broken)).render("Hi")


def test_several_templates_are_an_input_error_or_the_default_one(folder):
    named = {"default": "[{{ messages[0].content }}]", "rag": "no"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    try:
        assert Text(folder(chat_template=listed)).render("Hi") == "[Hi]"    # as transformers chooses
    except InputError as error:
        assert re.search("chat.template", str(error))


# ---- the end of an answer ------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, eos, stops", [
    ({}, 3, [3]),
    ({"generation": {"eos_token_id": [2, 0]}}, 3, [0, 2, 3]),       # the tokenizer's comes first, all stop
    ({"generation": {"eos_token_id": 2}, "eos_token": None}, 3, [2, 3]),
    ({"eos_token": None, "eos_in_config": [1, 2]}, 1, [1, 2]),
    ({"eos_token": {"content": "<user>", "lstrip": False}, "eos_in_config": None}, 1, [1])])
def test_every_named_eos_stops_and_the_first_one_is_learned(folder, arguments, eos, stops):
    text = Text(folder(**arguments))
    assert (text.eos, text.stops) == (eos, stops)


def test_without_an_eos_no_answer_could_end(folder):
    with pytest.raises(InputError, match="no end-of-text token is named"):
        Text(folder(eos_token=None, eos_in_config=None))


# ---- what can be wrong with the files ------------------------------------------------------------------

def test_a_folder_without_a_tokenizer_is_an_input_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no tokenizer.json"):
            Text(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"version": "1.0"}', b"<html>"])
def test_a_malformed_tokenizer_is_an_input_error(folder, content):
    path = folder()
    (path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer.json"):
        Text(path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe"])
def test_malformed_settings_are_an_input_error(folder, name, content):
    path = folder()
    (path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        Text(path)


def test_read_json_takes_an_absent_file_for_an_empty_one(tmp_path):
    assert read_json(tmp_path / "nothing.json") == {}
