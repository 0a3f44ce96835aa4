"""Every file that a user can hand in, damaged in every way: it is loaded, or refused in one sentence."""
import contextlib
import gzip
import io
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import toy
from commands import command, refused
from test_eval import annotations
from test_report import lines_of, made_in

import annotate
import eval
import serve
from data import attempt, sets
from data.barn.world import splits
from data.judges import prompts
from data.judges.person import Person
from data.weights import WeightsError, load_weights, read_safetensors, save_pretrained
from rlhf import reward_bench

ANSWERED = splits()["eval"][:6]
OUTPUTS = [{**record, "dataset": "barn", "generator": "mine"} for record in ANSWERED]
PAIRS = [{"instruction": record["instruction"], "input": "", "output_1": record["output"], "output_2": "No.",
          "preference": 1 + i % 2, "generator_1": "a", "generator_2": "b", "seed": f"/{i}"}
         for i, record in enumerate(ANSWERED)]
TRL = [{"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}], "score_chosen": 2, "score_rejected": 1}]
POOL = [{"name": "mine", "model": "barn-sim-00", "prompt": "prompt.json", "batch": 1, "temperature": .5}]
BENCH = [{"id": "ref:0", "prompt": "w8", "chosen": ["w9"], "rejected": ["w10", "w11"], "subset": "Ties"},
         {"id": "1", "prompt": "w8 w9", "chosen": ["w9"], "rejected": ["w10"], "subset": "Focus"}]
PROMPT = json.loads((Path(annotate.__file__).parent / "data" / "judges" / "pairwise.json").read_text())

# ---- damage --------------------------------------------------------------------------------------------

VALUES = (None, True, 0, -1, 5, 1.5, 1e300, 10 ** 18, "", "w3", "x" * 300, "\0", "../../x", [], {}, [[]], [5], [None],
          {"a": 5}, ["w1", "w2"], {"content": "w3"}, "a\nb")
RAW = ("NaN", "-Infinity", "1e400", "1" * 400, "1" * 5000, '"\\ud800"', "[" * 40 + "]" * 40, "[" * 400 + "]" * 400,
       '{"a":' * 5000 + "1" + "}" * 5000, '"' + "y" * 10_000_000 + '"', "01", "'x'", "")


def nodes(document):
    """All (container, key) in a JSON document."""
    found, left = [], [document]
    while left:
        one = left.pop()
        if isinstance(one, (dict, list)):
            keys = list(one) if isinstance(one, dict) else list(range(len(one)))
            found += [(one, key) for key in keys]
            left += [one[key] for key in keys]
    return found


def with_other_value(document, r, raw=RAW):
    """The text of a document in which one value is another, is gone, or has its key twice."""
    holder = [json.loads(json.dumps(document))]
    one, key = r.choice(nodes(holder))
    how = r.random()
    if how < .55:
        one[key] = r.choice(VALUES)
        return json.dumps(holder[0])
    if how < .85:
        one[key] = "@@"
        return json.dumps(holder[0]).replace('"@@"', r.choice(raw))
    if isinstance(one, dict) and how < .93:
        text = json.dumps(holder[0])
        return text.replace(json.dumps(key) + ":", f"{json.dumps(key)}: 5, {json.dumps(key)}:", 1)
    if isinstance(one, dict):
        del one[key]
    return json.dumps(holder[0])


BYTES = {                               # what editors, disks and networks do
    "mark": lambda data, r: b"\xef\xbb\xbf" + data, "lines": lambda data, r: data.replace(b"\n", b"\r\n"),
    "empty": lambda data, r: b"", "cut": lambda data, r: data[:r.randrange(len(data))],
    "utf-16": lambda data, r: data.decode().encode("utf-16"), "latin": lambda data, r: data[:9] + b"\xe9" + data[9:],
    "byte": lambda data, r: flipped(data, r), "twice": lambda data, r: data * 2, "blank": lambda data, r: b" \n\n",
    "zeros": lambda data, r: b"\0" * 50, "none": lambda data, r: data}


def flipped(data, r):
    at = r.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1:]


def whole(document, rows=False):
    """The bytes of a file. rows: it has one JSON value on each line."""
    if isinstance(document, str):
        return document.encode()
    return ("\n".join(map(json.dumps, document)) if rows else json.dumps(document, indent=1)).encode()


def damaged(document, r, rows=False, raw=RAW):
    """The bytes of a file, damaged. raw: what may stand in the place of a value."""
    if isinstance(document, str) or r.random() < .25:
        return r.choice(list(BYTES.values()))(whole(document, rows), r)
    if not rows:
        return with_other_value(document, r, raw).encode()
    i = r.randrange(len(document))
    return "\n".join([*map(json.dumps, document[:i]), with_other_value(document[i], r, raw),
                      *map(json.dumps, document[i + 1:])]).encode()


LOOKED_AT = ("best_of_n/curve.json", "pairs/pairs.json", "ppo/metrics.jsonl", "sft/samples.jsonl")   # in report.html
UNNAMED = {"template", *LOOKED_AT}      # a sentence names the folder, or a report leaves out what it cannot read

# ---- what reads the files ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder with a good file of every kind."""
    folder = tmp_path_factory.mktemp("things")
    toy.base(folder, "{{ bos_token }}{{ messages[0].content }}")
    (folder / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    (folder / "base" / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "w6"}}))
    (folder / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    shutil.copytree(toy.run_folder(folder / "lora", "lora") / "run" / "sft" / "checkpoint", folder / "adapter")
    save_pretrained(folder / "sharded", dict(load_weights(folder / "base")), json.loads(
        (folder / "base" / "config.json").read_text()), folder / "base", shard_bytes=9000)
    made_in(folder / "run"), made_in(folder / "run2")
    fixed(folder / "good.json", PAIRS), fixed(folder / "prompt.json", PROMPT)
    for model in ("mine", "o3"):
        lines_of(folder / "model_answer" / f"{model}.jsonl", [
            {"uid": f"q{i}", "messages": [{"role": "user", "content": "?"}, {
                "role": "assistant", "content": {"answer": f"{model} {i}"}}]} for i in range(4)])
    lines_of(folder / "model_judgment" / "gpt" / "mine.jsonl", [
        {"uid": f"q{i}", "category": "hard", "judge": "gpt", "model": "mine", "baseline": "o3",
         "games": [{"score": "A>B"}, {"score": "B>>A"}]} for i in range(4)])
    outcome(*annotating(folder / "good.json", "--cache", folder / "judge.jsonl"))
    with contextlib.closing(Person("me", folder / "me.jsonl")) as person:
        _, questions = annotate.plan(PAIRS, annotate.pool("me"))
        person.pairs = {key: one.texts for key, one in zip(person.keys(questions), questions)}
        for key in person.pairs:
            person.act(key, "a")
    return folder


def annotating(path, *flags):
    out = path.parent / "out" / "annotated.json"
    return annotate.main, [path, "--judge", "barn", "--pool", "p_single", "--out", out, *flags]


def evaluating(path, *flags):
    return eval.main, [*flags, "--out", path.parent / "out", *["--resamples", "9"] * (
        not {"--judge_report", "--rankings"} & set(flags))]


def asking(folder):
    return serve.main, [folder, "--ask", "w8 w9", "--max_new_tokens", "2", "--device", "cpu"]


def fixed(path, document):
    """A good file beside the damaged one."""
    path.write_text(json.dumps(document))
    return path


KINDS = {                               # kind of file: (its path, what is in it, the command that reads it)
    "pairs": ("pairs.json", PAIRS, annotating),
    "pairs in lines": ("pairs.jsonl", PAIRS, annotating),
    "samples": ("samples.json", [{"instruction": "Hi", "output": ["a", "b", "c"]}], annotating),
    "outputs": ("mine.json", OUTPUTS, lambda path: evaluating(
        path, "--outputs", path, "--reference", fixed(path.with_name("ref.json"), ANSWERED), "--judge", "barn")),
    "reference": ("theirs.json", OUTPUTS, lambda path: evaluating(
        path, "--outputs", fixed(path.with_name("ours.json"), OUTPUTS), "--reference", path, "--judge", "barn")),
    "annotations": ("annotations.json", annotations("m", [1., 2., 1.5, None] * 5), lambda path: evaluating(path, path)),
    "annotations in lines": ("annotations.jsonl", annotations("m", [1., 2., 1.5] * 5),
                             lambda path: evaluating(path, path, "--report")),
    "labels": ("labels.json", [{**pair, "annotator": "x", "judge": "j", "pool": "p", "effort": "low",
                                "price_per_example": .1, "time_per_example": 1.} for pair in PAIRS * 3],
               lambda path: evaluating(path, "--judge_report", path, "--human", path, "--second", path)),
    "difficulties": ("lc.json", {"instruction_difficulty": [.1] * 20, "gamed": [
        {"std_delta_len": [.1] * 20, "preference": [.5] * 20}] * 3}, lambda path: evaluating(
            path, fixed(path.with_name("a20.json"), annotations("m", [1., 2.] * 10)), "--lc_data", path,
            "--reference", fixed(path.with_name("r20.json"), [
                {"instruction": f"Sing {i}.", "output": "la" * (5 + i % 3), "generator": "ref"} for i in range(20)]))),
    "leaderboard": ("board.csv", "name,win_rate,lc\na,50.1,1\nb,20,2\nc,70,3\nd,90,4\n", lambda path: evaluating(
        path, "--rankings", path, path)),
    "judgments": ("model_judgment/gpt/mine.jsonl", None, lambda path: evaluating(path, "--arena_hard", path)),
    "model answers": ("model_answer/o3.jsonl", None, lambda path: evaluating(
        path, "--arena_hard", path.parents[1] / "model_judgment" / "gpt")),
    "pool": ("pool.json", POOL, lambda path: annotating(
        path.with_name("good.json"), "--judge", "", "--pool", path, "--dry_run", "--replay")),
    "prompt": ("prompt.json", PROMPT, lambda path: annotating(
        path.with_name("good.json"), "--judge", "", "--pool", fixed(path.with_name("pool.json"), POOL),
        "--dry_run", "--replay")),
    "cache": ("judge.jsonl", None, lambda path: annotating(path.with_name("good.json"), "--cache", path)),
    "clicks": ("me.jsonl", None, lambda path: annotating(
        path.with_name("good.json"), "--judge", "me", "--replay", "--max_unusable", "1", "--cache", path)),
    "preferences": ("preferences.json", PAIRS, lambda path: (sets.preferences, path)),
    "their preferences": ("trl.jsonl", TRL, lambda path: (sets.preferences, path)),
    "instructions": ("data.json", [{"instruction": f"i{i}", "input": "", "output": "o"} for i in range(40)],
                     lambda path: (sets.load, path)),
    "questions": ("bench.jsonl", BENCH, lambda path: (reward_bench.read_reward_bench, path)),
    **{name: (f"run/{name}", None, lambda path: evaluating(path, path.parents[1], "--report"))
       for name in ("sft/config.json", "ppo/result.json", "sft/annotations.json", *LOOKED_AT)},
    "config of a run among others": ("run/dpo/config.json", None, lambda path: evaluating(
        path, path.parents[1], path.parents[2] / "run2")),
    "config of a model": ("base/config.json", None, lambda path: asking(path.parent)),
    "generation": ("base/generation_config.json", None, lambda path: asking(path.parent)),
    "tokenizer": ("base/tokenizer.json", None, lambda path: asking(path.parent)),
    "settings of a tokenizer": ("base/tokenizer_config.json", None, lambda path: asking(path.parent)),
    "special tokens": ("base/special_tokens_map.json", None, lambda path: asking(path.parent)),
    "template": ("base/chat_template.jinja", "{{ messages[0].content }}{% if bos_token %}{{ bos_token }}{% endif %}",
                 lambda path: asking(path.parent)),
    "index": ("sharded/model.safetensors.index.json", None, lambda path: asking(path.parent)),
    "adapter": ("adapter/adapter_config.json", None, lambda path: asking(path.parent)),
}


def outcome(main, argv):
    """(exit code, what is said on standard output and on standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        given = list(map(str, argv)) if isinstance(argv, list) else str(argv)
        code = attempt(main, given, "command", "nothing is lost")
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def kept(things, kind):
    """The path of the file of a kind, and what is in it; it is put back at the end."""
    name, document, _ = KINDS[kind]
    path = things / name
    path.parent.mkdir(parents=True, exist_ok=True)
    good = path.read_bytes() if path.exists() else None
    if document is None:
        document = [json.loads(line) for line in good.splitlines()] if path.suffix == ".jsonl" else json.loads(good)
    yield path, document
    path.write_bytes(good or whole(document, path.suffix == ".jsonl"))


@pytest.mark.parametrize("many", [5, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_loaded_or_refused_in_a_sentence(kind, many, kept):
    (path, document), reading, r = kept, KINDS[kind][2], random.Random(f"{kind} {many}")
    rows, said = path.suffix == ".jsonl", []
    for i in range(-1, many):
        shutil.rmtree(path.parent / "out", ignore_errors=True)
        prompts.template.cache_clear()
        path.write_bytes(whole(document, rows) if i < 0 else damaged(document, r, rows))
        code, out, err = outcome(*reading(path))
        elsewhere = code == 1 and "HF_HUB_OFFLINE" in err       # it names another model, which is not here
        assert code == 0 or i >= 0 and code in (2, 3) or elsewhere, (i, err)
        assert code == 0 or len(err.strip().splitlines()) == 1 and len(err) < 950, (i, err)
        said.append(out + err)
    assert many < 20 or kind in UNNAMED or any(path.name in each for each in said), said


EXAMPLES = {                            # kind of file: (the damage, what the sentence says)
    "pairs": (lambda pairs: pairs[2].update(seed=5), "pairs.json: row 2 has no text under 'seed', but 5"),
    "their preferences": (lambda pairs: pairs[0].update(chosen=5), "trl.jsonl: row 0: expected a prompt and an answer"),
    "reference": (lambda rows: rows[3].update(dataset=["a"]), "theirs.json: row 3 has no text under 'dataset', but"),
    "settings of a tokenizer": (lambda config: config.update(unk_token="\ud83d"),
                                "tokenizer_config.json: not JSON .*half of a surrogate pair"),
    "adapter": (lambda config: config.update(lora_alpha="@@"), "adapter_config.json: .*the number 1e400 is too large"),
    "config of a model": (lambda config: config.update(hidden_size=[[]]), "config.json: hidden_size .* is not a whole"),
    "labels": (lambda rows: rows[1].update(preference="@@"), "labels.json: row 1: not JSON .*1e400 is too large"),
    "sft/config.json": (lambda config: config.update(needs=[]), "config.json: 'needs' must be texts by name"),
    "ppo/result.json": (lambda result: result["metrics"].update({"objective/kl": "x"}), "'objective/kl' must be a num"),
    "pool": (lambda pool: pool[0].update(prompt="\0"), "pool.json: row 0 .mine.: 'prompt' must be the name of a prom")}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_sentence_says_where_and_what(kind, kept):
    (path, document), (damage, said) = kept, EXAMPLES[kind]
    document = json.loads(json.dumps(document))
    damage(document)
    path.write_bytes(whole(document, path.suffix == ".jsonl").replace(b'"@@"', b"1e400"))
    code, _, err = outcome(*KINDS[kind][2](path))
    assert code == 2 and re.search(said, err), err


def test_a_packed_file_that_is_cut_is_refused(tmp_path):
    data = gzip.compress(whole(PAIRS))
    for end in range(0, len(data), 25):
        (tmp_path / "pairs.json.gz").write_bytes(data[:end])
        code, _, err = outcome(*annotating(tmp_path / "pairs.json.gz"))
        assert code == 2 and "pairs.json.gz" in err, (end, err)


# ---- where results go ----------------------------------------------------------------------------------

def commands(out):
    """Command lines that would write to `out`, a folder or a file."""
    pairs = fixed(out.parents[out.name == "below"] / "good.json", PAIRS)
    return {"annotate.py": [pairs, "--judge", "barn", "--out", out / "a.json"],
            "eval.py": ["--attack", "--limit", "2", "--out", out],
            "farm.py": ["--method", "base", "--limit", "4", "--out", out]}


@pytest.mark.parametrize("script", ["annotate.py", "eval.py", "farm.py"])
@pytest.mark.parametrize("where", ["link", "file", "link/below", "file/below"])
def test_where_nothing_can_be_written_another_place_is_asked_for(tmp_path, script, where):
    (tmp_path / "link").symlink_to("nowhere/at/all"), (tmp_path / "file").write_text("mine")
    refused(command(script, *commands(tmp_path / where)[script]), 2, f"{where.partition('/')[0]}.*choose another --out")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("argv", [["annotate.py", "x.json", "--out", ""], ["eval.py", "--attack", "--out", " "],
                                  ["farm.py", "--method", "base", "--out", ""], ["annotate.py", "x", "--cache="],
                                  ["farm.py", "--method", "base", "--seeds", "0,1", "--out", ""],
                                  ["farm.py", "--study", "labels", "--quick", "--out", ""]], ids=str)
def test_no_path_at_all_is_none(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    refused(command(*argv), 2, "empty")
    assert not list(tmp_path.iterdir())


def test_a_file_of_labels_is_replaced_by_labels_and_no_other_file_is(tmp_path):
    pairs, out = fixed(tmp_path / "pairs.json", PAIRS), tmp_path / "annotated.json"
    labelling = ["annotate.py", pairs, "--judge", "barn"]
    for _ in range(2):
        assert command(*labelling, "--out", out).code == 0
    refused(command("annotate.py", out, "--judge", "barn", "--out", out), 2, "annotated.json is read.*choose another")
    for other in (pairs, fixed(tmp_path / "other.json", OUTPUTS), fixed(tmp_path / "text.json", "words")):
        before = other.read_bytes()
        refused(command(*labelling, "--out", other), 2, f"{other.name} is .*choose another --out")
        assert other.read_bytes() == before
    link = tmp_path / "link.json"
    link.symlink_to("nowhere.json")
    refused(command(*labelling, "--out", link), 2, "leads nowhere: choose another --out")


def test_attacks_do_not_take_the_place_of_a_leaderboard_nor_the_other_way_round(tmp_path):
    models = fixed(tmp_path / "a.json", annotations("m", [1., 2.] * 9))
    ranking, attack = ("eval.py", models, "--resamples", "9", "--out"), ("eval.py", "--attack", "--limit", "2", "--out")
    for one, other in ((ranking, attack), (attack, ranking)):
        out = tmp_path / ("ranking" if one is ranking else "attack")
        assert command(*one, out).code == command(*one, out).code == 0
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        refused(command(*other, out), 2, "leaderboard.csv is there.*choose another --out")
        assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "leaderboard.csv").write_text("name,win_rate\na,5\n")
    for argv in (ranking, attack, ("farm.py", "--method", "base", "--limit", "4", "--out")):
        refused(command(*argv, tmp_path / "mine"), 2, "leaderboard.csv is there.*choose another --out")
    assert (tmp_path / "mine" / "leaderboard.csv").read_text() == "name,win_rate\na,5\n"


@pytest.mark.parametrize("argv", [["annotate.py", "x.json", "--pool=--"], ["eval.py", "x.json", "--judge-body=--"],
                                  ["farm.py", "--method", "sft", "--judge=--"], ["serve.py", "barn", "--name=--"],
                                  ["farm.py", "--method", "dpo", "--sft.lr=--"]], ids=str)
def test_two_dashes_are_no_value(argv):
    refused(command(*argv), 2, "-- is no value")


# ---- weights -------------------------------------------------------------------------------------------

HEADER = {"__metadata__": {"format": "pt"}, "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
          "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
          "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
          "d": {"dtype": "U8", "shape": [0, 7], "data_offsets": [40, 40]}}
SHORT = [raw for raw in RAW if len(raw) < 100_000]
LENGTHS = (0, 1, 7, 8, 63, 64, 2 ** 31, 2 ** 63 - 1, 2 ** 64 - 1, 100_000_001)


def safetensors(header, r):
    """The bytes of a safetensors file whose header, its length or its data may be damaged."""
    head = damaged(header, r, raw=SHORT) if r.random() < .8 else json.dumps(header).encode()
    length = len(head) if r.random() < .9 else r.choice((*LENGTHS, len(head) - 1, len(head) + 1))
    data = bytes(40 if r.random() < .9 else r.choice((0, 1, 39, 41, 400)))
    return (max(0, length).to_bytes(8, "little") + head + data)[:None if r.random() < .9 else -1]


@pytest.mark.parametrize("many", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_damaged_file_of_weights_is_read_whole_or_refused_in_a_sentence(tmp_path, many):
    r, path, kept, refused = random.Random(many), tmp_path / "model.safetensors", 0, 0
    for i in range(many):
        path.write_bytes(safetensors(HEADER, r))
        try:
            tensors, metadata = read_safetensors(path)
            size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
            assert size <= path.stat().st_size and all(isinstance(text, str) for text in metadata.values()), i
            kept += 1
        except WeightsError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 900, i
            refused += 1
    assert min(kept, refused) > many / 20


@pytest.mark.parametrize("outputs", [[[]], [["a"]], [[], []], [["a"], []]])
def test_one_output_is_no_pair(tmp_path, outputs):
    path = fixed(tmp_path / "samples.json", [{"instruction": "Hi", "output": texts} for texts in outputs])
    refused(command("annotate.py", path, "--judge", "barn", "--out", tmp_path / "a.json"), 2, "samples.json: row 0 has")
