"""Chat templates: the shapes of famous ones byte for byte as in transformers, and greedy ones stopped elsewhere."""
import importlib.metadata
import json
import subprocess
import sys
from itertools import product

import pytest
from quick import few

from data import InputError, sandbox, template
from data.template import renderer, trial
from rlhf.config import BASE

TOKENS = {"bos_token": "<user>", "eos_token": "<assistant>", "pad_token": "<pad>", "image_token": "<image>"}


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """A little memory is enough for tests, and nothing is remembered from one to another."""
    monkeypatch.setattr(template, "MEMORY", 1 << 28)
    yield
    renderer.cache_clear(), trial.cache_clear()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A tokenizer of transformers that has TOKENS."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "tokenizer.json").write_bytes((BASE / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return transformers.AutoTokenizer.from_pretrained(folder)


def said(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


PLAIN = said("List two trees.")

# ---- as transformers renders them ----------------------------------------------------------------------

TEMPLATES = {
    "llama 3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date is defined %}
    {%- if strftime_now is defined %}
        {%- set date = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set told = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "Today is " + date + "\\n\\n" }}{{- told }}{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- else %}
        {{- "<|start|>ipython<|end|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
""",
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not (message.content.startswith('<tool_response>') \
and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
             "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
             "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
             "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim"
             " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set told = messages[0]["content"] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in rest %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and told is defined %}
            {{- "[INST] " + told + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
""",
    "phi 3": "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
             "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
             "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
             "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "smollm 3": """{# ───── defaults ───── #}
{%- if enable_thinking is not defined -%}
{%- set enable_thinking = true -%}
{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{%- if messages[0].role == "system" -%}
  {%- set told = messages[0].content -%}
  {%- if "/no_think" in told -%}{%- set mode = "/no_think" -%}{%- endif -%}
  {%- set told = told.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "<|im_start|>system\\n" -}}
{%- set today = strftime_now("%d %B %Y") -%}
{{- "Today: " ~ today ~ "\\n" -}}{{- "Mode: " + mode + "\\n\\n" -}}
{%- if told -%}{{- told + "\\n\\n" -}}{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if mode == "/think" -%}
            {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- elif message.role == "tool" -%}
    {{ "<|im_start|>" + "user\\n"  + content + "<|im_end|>\\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\\n" }}
{%- endif -%}
""",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
              "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
              "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
              "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
              "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "all there is": """{% set seen = namespace({'n': 0}, self=1) %}
   {%- for message in messages if message.content %}
  {% if loop.index > 2 %}{% break %}{% endif %}
  {% if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}
  {% set seen.n = seen.n + 3 * loop.index %}{% set inner = 'lost' %}
{{ '%-8s|' % message.role }}{{ message.content|title|center(40) }}
    {% endgeneration %}
 {{ inner }}{{ inner is defined }}
{% endfor %}
{{ messages|tojson(ensure_ascii=True, indent=2, separators=(',', ':'), sort_keys=True) }}
{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys('ab', seen.n * 1.5) }}{{ seen.self }}
{%- macro shout(x) %}  {{ x|upper }}!  {% endmacro %}
{{ shout('done') }}{{ tools is defined }}{{ documents is none }}{{ bos_token }}{{ pad_token }}{{ unk_token is defined }}
{{ image_token }}{{ add_generation_prompt }}
""",
}
CHATS = [
    PLAIN, said("  spaces \n\n"), said("{{ 7 * 7 }} {% raw %}"), said("é😀 <b>&amp;</b> \\ \" ' \0 \r\n<|im_end|>"),
    said(""), said("Be brief.", "Hi", roles=("system", "user")),
    said("Be /no_think", "Hi", "Ho", roles=("system", "user", "assistant")),
    said("One", "<think>\nhm\n</think>\n\nTwo", "Three"), said("One", "Two", " Three\n", "\nFour", "Five"),
    said("Assistant first", "User", roles=("assistant", "user")), said("a", "b", roles=("user",)),
    said("Look it up", "", "4 <5>", roles=("user", "assistant", "tool"))]
VALUES = [
    {}, {"enable_thinking": False}, {"add_generation_prompt": False}, {"date": "1 May 2020"}, {"tools": [
        {"type": "function", "function": {"name": "søk", "parameters": {"b": "<i>", "a": [1, 2.5, None, True]}}}]}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_famous_shapes_render_as_in_transformers(theirs, name):
    source, rendered = TEMPLATES[name], 0
    for chat, values in product(CHATS, VALUES):
        options = {"add_generation_prompt": True, **values}
        try:
            wanted = theirs.apply_chat_template(chat, chat_template=source, tokenize=False, **options)
        except Exception as error:
            with pytest.raises(InputError, match="the chat template fails: ") as ours:
                renderer(source)(chat, **TOKENS, **values)
            assert str(error) in str(ours.value)
        else:
            assert renderer(source)(chat, **TOKENS, **values) == wanted
            rendered += 1
    assert rendered >= 5 * len(VALUES)


def test_a_template_may_refuse_a_chat_and_render_others():
    render = renderer(TEMPLATES["gemma"])
    assert render(PLAIN, **TOKENS).startswith("<user><start_of_turn>user\n")
    with pytest.raises(InputError, match="^the chat template fails: System role not supported$"):
        render(said("Be brief.", "Hi", roles=("system", "user")), **TOKENS)


def test_what_a_template_says_is_shown_in_one_plain_line():
    source = "{{ raise_exception('No!\n\x1b[31m\r ' ~ range(9999)|join) }}"
    with pytest.raises(InputError) as error:
        renderer(source)(PLAIN)
    assert str(error.value).startswith("the chat template fails: No! [31m") and len(str(error.value)) < 400
    assert str(error.value).isprintable()
    with pytest.raises(InputError, match="^the chat template fails: TemplateError$"):
        renderer("{{ raise_exception('') }}")(PLAIN)


# ---- greed ---------------------------------------------------------------------------------------------

DOUBLING = "{% set ns = namespace(x='0123456789') %}{% for i in range(99) %}{% set ns.x = BODY %}{% endfor %}"
ATTACKS = {
    "{{ 'a' * 3000000000 }}": "small numbers",
    "{{ 3000000000 * 'a' }}": "small numbers",
    "{{ [0] * 3000000000 }}": "small numbers",
    "{{ 9 ** 9999999 }}": "small numbers",
    "{% set n = 9999999 %}{{ 9 ** n }}": "small numbers",
    DOUBLING.replace("BODY", "ns.x|length * ns.x"): "small numbers",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}": "small numbers",
    "{{ '%2000000000d' % 1 }}": "more work",
    "{{ '%*d' % (2000000000, 1) }}": "more work",
    "{{ '{:2000000000d}'.format(1) }}": "more work",
    "{{ '%2000000000d'|format(1) }}": "more work",
    "{{ 'x'|center(2000000000) }}": "more work",
    "{% if messages[1] %}{% set y = 'x'|center(2000000000) %}{% endif %}": "more work",       # only while compiling
    "{{ 'x'.ljust(2000000000) }}": "more work",
    "{{ 'x'.zfill(2000000000)|length }}": "more work",
    "{{ messages|tojson(indent=2000000000) }}": "more work",
    "{{ messages|batch(2000000000, 'x')|list|length }}": "more work",
    DOUBLING.replace("BODY", "ns.x ~ ns.x"): "more work",
    DOUBLING.replace("BODY", "ns.x + ns.x"): "more work",
    DOUBLING.replace("BODY", "ns.x.replace('0', ns.x)"): "more work",
    DOUBLING.replace("BODY", "[ns.x, ns.x]|join"): "more work",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}": "more work",
    "{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}": "1000000 characters|more work",
    "{% set x %}{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}{% endset %}":
        "more work",
    "{{ 'x'.ljust(1000100) }}": "1000000 characters",
    "{{ lipsum(n=100000) }}": "lipsum",
    "{{ range(100001)|list }}": "Range too big",
    "{% if messages|length == 3 %}{{ 'x'|center(2000000000) }}{% endif %}": "more work",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}": "recursion",
    "{{ " + "-" * 30000 + "1 }}": "recursion",
}


@pytest.mark.parametrize("source", few(ATTACKS, *list(ATTACKS)[::4]), ids=lambda source: source[:60])
def test_a_greedy_template_is_refused_and_this_process_does_not_grow(source):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=rf"^the chat template fails: .*({ATTACKS[source]})"):
        renderer(source)(PLAIN)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.1 * before


@pytest.mark.parametrize("name, limit, said", [("SECONDS", 1, "1 seconds of the CPU"), ("PATIENCE", .5, "0.5 seconds")])
def test_a_child_that_does_not_end_is_ended(monkeypatch, name, limit, said):
    """By the seconds of the CPU that it takes; those on the clock are many more, since the machine may be busy."""
    pytest.importorskip("resource")
    loop = "import data.template as t\ndef compiled(source):\n while True: pass\nt.compiled = compiled\n"
    monkeypatch.setattr(template, "CHILD", f"import sys; sys.path = sys.argv[1:]\n{loop}t.render_test_chats()")
    monkeypatch.setattr(template, name, limit)
    assert template.trial.__wrapped__("x") == f"it needs more than {said} for a short chat"


@pytest.mark.parametrize("a, b", [(6, 7), (-3, 4), (2.5, 4), (True, 3), (1 << 31, 1 << 31), (0.1, 0.2)])
def test_small_numbers_are_multiplied(a, b):
    assert renderer(f"{{{{ {a} * {b} }}}} {{{{ a * b }}}}")(PLAIN, a=a, b=b) == f"{a * b} {a * b}"


@pytest.mark.parametrize("a, b", [
    (2, (1 << 31) + 1), (1e10, 1), (float("nan"), 1), ("x", 2), (2, "x"), ([1], 2), (None, 1)])
def test_nothing_else_is(a, b):
    with pytest.raises(InputError, match="small numbers"):
        renderer("{{ a * b }}")(PLAIN, a=a, b=b)


LATE = {                                # what only a budget in this process stops; the trial never gets there
    **{source: why for source, why in ATTACKS.items() if why != "recursion" and "if messages" not in source},
    **dict.fromkeys((
        "{{ ('a\n'|center(9999))|replace(' ', '\n')|indent(9999) }}",
        "{{ 'a'.ljust(9999, 'a')|wordwrap(1, wrapstring='x'.ljust(99999)) }}",
        "{{ '\t'.ljust(9999, '\t').expandtabs(99999) }}",
        "{% set x = 'x'.ljust(9999).split(' ') %}{{ 'x'.ljust(99999).join(x) }}", "{{ '{0:{1}}'.format(1, 99999999) }}",
        "{% set ns = namespace(x=0) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=0) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
        "{% set ns = namespace(x=(0, 0)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
        "{{ messages[0][ns.x] }}",
        "{% set ns = namespace(x=0, y=0) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% endfor %}", "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = ns.x + [range(99999)|list] %}"
        "{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x, ('x'.ljust(99999))[1:]] %}"
        "{% endfor %}", "{% set ns = namespace(x=[range(99999)|list]) %}{% for i in range(20) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|sum(start=[])|length }}",
        "{% set x = 'x'.ljust(99999) %}{{ range(99999)|map('replace', '', x)|join }}",
        "{% filter center(99999999) %}x{% endfilter %}", "{{ range(99999)|map('string')|map('center', 99999)|list }}",
        "{% for i in range(99999) %}{% if 'b' in 'a'.ljust(99999, 'a') %}{% endif %}{% endfor %}",
        "{% set x = 'a'.ljust(99999, 'a') %}{% for i in range(20000) %}{% if 'b' in x %}{% endif %}{% endfor %}"),
        "more work")}


@pytest.mark.parametrize("source", few(LATE, *[source for source in LATE if source not in ATTACKS][::4]),
                         ids=lambda source: source[:60])
def test_a_word_that_no_test_chat_has_cannot_set_greed_free(monkeypatch, source):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sandbox, "WORK", sandbox.WORK // 10)            # so that this test is done sooner
    render = renderer("{{ messages[0].content }}{% if 'now' in messages[0].content %}" + source + "{% endif %}")
    assert render(PLAIN) == "List two trees."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=rf"^the chat template fails: .*({LATE[source]}|more work)"):
        render(said("now"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (200 << 10)            # 200 MB
    assert render(PLAIN) == "List two trees."


def test_what_gets_past_the_trial_may_not_write_much_either():
    render = renderer("{% if messages[0].content == 'now' %}{% for i in range(99999) %}{{ 'twelve chars' }}{% endfor %}"
                      "{% endif %}{{ messages[0].content }}")
    assert render(PLAIN) == "List two trees."
    with pytest.raises(InputError, match="it adds more than 1000000 characters"):
        render(said("now"))


def test_a_long_chat_is_not_the_template_s_greed():
    long = "word " * 500_000
    assert renderer("<{{ messages[0].content }}>")(said(long)) == f"<{long}>"


def test_a_template_has_at_most_64_kb():
    render = renderer("{{ messages[0].content }}{#" + "x" * (65536 - 29) + "#}")
    assert render(PLAIN) == "List two trees."
    with pytest.raises(InputError, match="the chat template has 65537 characters, more than 65536"):
        renderer("x" * 65537)


# ---- the trial -----------------------------------------------------------------------------------------

def test_the_trial_is_made_once_however_it_ends(monkeypatch):
    runs, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: runs.append(args) or run(*args, **options))
    for _ in range(3):
        assert renderer("[{{ messages[0].content }}]")(PLAIN) == "[List two trees.]"
        with pytest.raises(InputError, match="chat template"):
            renderer("{% for")
    assert len(runs) == 2


def test_every_probe_is_tried():
    source = ("{% if messages|map(attribute='role')|join(' ') == ROLES and ODD == ('\0' in messages[0].content) %}"
              "{{ 'x'|center(2000000) }}{% endif %}")
    for roles, odd in (("user", 0), ("user", 1), ("system user", 0), ("user assistant user", 0), ("user assistant", 0)):
        complaint = trial(source.replace("ROLES", repr(roles)).replace("ODD", str(odd)))
        greedy = "it adds more than 1000000 characters to a chat"
        assert complaint == (greedy if roles[-4:] == "user" else "it loses the user's text")


def test_the_child_needs_neither_torch_nor_the_folder_it_runs_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("encodings", "json", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(template, "CHILD", template.CHILD + "; print(*sys.modules)")
    modules = trial("{{ messages[0].content }}").split()
    assert {"jinja2", "data.template"} <= set(modules)
    assert not {"torch", "tokenizers", "numpy", "requests", "site", "sitecustomize"} & set(modules)


@pytest.mark.skipif(sys.platform != "linux", reason="not every system knows these limits")
def test_the_child_has_limits_of_its_own_and_leaves_no_core_file(monkeypatch):
    shown = '; import resource as r; print(*map(r.getrlimit, (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_CORE)))'
    monkeypatch.setattr(template, "CHILD", template.CHILD + shown)
    assert trial("{{ messages }}") == f"(10, 11) ({1 << 28}, {1 << 28}) (0, 0)"


def test_a_child_that_dies_is_the_template_s_fault(monkeypatch):
    monkeypatch.setattr(template, "CHILD", "import os; os._exit(9)")
    with pytest.raises(InputError, match="^the chat template fails: it ends the process that .*, exit code 9$"):
        renderer("{{ messages }}")
    trial.cache_clear()
    monkeypatch.setattr(template, "CHILD", "import sys; sys.path = []; import nothing")
    with pytest.raises(InputError, match="exit code 1 ModuleNotFoundError: No module named 'nothing'$"):
        renderer("{{ messages }}")


@pytest.mark.parametrize("source", ["{% for m in messages %}", "{{ 1 + }}", "{% nonsense %}", "{{ 'x'|nofilter }}",
                                    "{% generation %}", "{% endgeneration %}", "{% break %}", "\ud800{{"])
def test_what_does_not_compile_is_not_a_template(source):
    with pytest.raises(InputError, match="the chat template fails: "):
        renderer(source)


# ---- the sandbox ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", [
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "{{ namespace(__html__=1) }}", "{{ namespace({'_x': 1}) }}",
    "{{ dict.update(messages[0], role='x') }}", "{{ dict.mro() }}", "{{ dict.__base__.x }}",
    "{{ raise_exception.__globals__.x }}", "{{ strftime_now.__code__.x }}", "{{ namespace.mro() }}",
    "{{ dict.fromkeys.__self__.x }}", "{{ messages[0].pop('role') }}", "{{ ''|attr('format')|attr('__self__') + '' }}"])
def test_what_is_offered_gives_no_way_out(source):
    chat = said("Hi")
    with pytest.raises(InputError, match="^the chat template fails: "):
        renderer(source)(chat)
    assert chat == said("Hi")


def test_an_old_jinja2_is_not_trusted(monkeypatch):
    for version in ("3.1.6", "3.1.10", "3.2.0rc1", "4.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert renderer("{{ messages[0].content }}" + version)(PLAIN) == f"List two trees.{version}"
    for version in ("3.1.5", "3.0.3", "2.11"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        with pytest.raises(InputError, match=f"chat template needs jinja2 3.1.6 .* here is {version}, .*: pip install"):
            renderer("{{ messages[0].content }}")


# ---- a template that loses the text --------------------------------------------------------------------

@pytest.mark.parametrize("source", [
    "Hi", "{{ messages[0].role }}", "{{ messages[0].content|length }}", "{{ messages[0].content[:9] }}",
    "{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"])
def test_a_template_that_loses_the_text_is_refused(source):
    with pytest.raises(InputError, match="^the chat template fails: it loses the user's text$"):
        renderer(source)


@pytest.mark.parametrize("source", ["{{ messages[0].content|upper }}", "{{ messages[-1].content|trim }}!",
                                    "{{ messages|tojson }}"])
def test_a_template_may_change_the_text(source):
    assert renderer(source)(PLAIN)
