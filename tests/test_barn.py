"""The offline world: instructions, splits, what the true reward sees, and how its annotators differ."""
import hashlib
import json
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests

from annotate import CROWDS, pool, usual_flip
from data.attacks import ATTACKS
from data.barn.judge import (BODY, POOLS, TASTES, Handler, knows, make_pool, pool_at, preferences, prefers_first,
                             probability_first, serve, texts_shown, win_probabilities)
from data.barn.reward import WEIGHTS, features, known_bigrams, reason_in, true_reward
from data.barn.world import (ASKED, CLEAN, EVEN, KINDS, MIXED, PATTERNS, PLAIN, SIZES, demo, demonstrate,
                             draw_instruction, parse, pretraining_texts, splits)
from data.sets import load
from data.judges.prompts import Annotator, request_body
from data.judges.verdicts import verdicts
from stats.agreement import agreement as agree
from stats.agreement import majority, one_against_rest

ROOT = Path(__file__).parents[1]
DEFECTS, VIRTUES = ("wrong", "count", "repeat", "ramble", "rude", "cut"), ("opening", "detail", "closing")
SIM, HUMAN, FAR = ([annotator.model for annotator in pool(judge)] for judge in ("barn", "barn-human", "barn-far"))


def drawn(n, seed, kinds=tuple(KINDS), **how):
    r = random.Random(seed)
    return [draw_instruction(r, kinds, **how) for _ in range(n)]


def answered(n, seed, mix, kinds=tuple(KINDS)):
    """n drawn (instruction, answer text)."""
    r = random.Random(f"answers {seed}")
    return [(instruction, demonstrate(instruction, r, mix)) for instruction in drawn(n, seed, kinds)]


# ---- instructions and splits ---------------------------------------------------------------------------

def test_every_instruction_reads_back_as_its_kind_and_slots():
    instructions = drawn(6000, 0)
    for instruction in instructions:
        assert parse(instruction.text) == (instruction.kind, instruction.slots)
    assert {instruction.kind for instruction in instructions} == KINDS.keys()


@pytest.mark.parametrize("phrasings", ["new", "both"])
def test_new_phrasings_read_back_too(phrasings):
    instructions = drawn(4000, 1, phrasings=phrasings)
    assert all(parse(instruction.text) == (instruction.kind, instruction.slots) for instruction in instructions)
    assert {instruction.kind for instruction in instructions} == KINDS.keys()


@pytest.mark.parametrize("text", ["", "Hello.", "Describe a cow", "Describe a cow. And a pig.", "Anna asks: ",
                                  " Describe a cow.", "describe a cow.", "Write a poem about a cow."])
def test_what_is_of_another_world_is_no_instruction(text):
    assert parse(text) is None


def test_splits_are_unique_disjoint_complete_and_readable():
    instructions = [record["instruction"] for records in splits().values() for record in records]
    assert {split: len(records) for split, records in splits().items()} == SIZES
    assert list(SIZES) == ["sft", "preference", "unlabeled", "val", "eval"] and SIZES["eval"] == 805
    assert len(instructions) == len(set(instructions)) == sum(SIZES.values())
    assert all(map(parse, instructions))
    assert all(record.keys() == {"instruction", "input", "output", "dataset"} and record["output"].strip()
               for records in splits().values() for record in records)


def digest(document):
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]


def test_what_the_base_checkpoint_was_trained_on_has_not_changed():
    """Who changes one of these must train the base checkpoint again, and measure everything again."""
    assert digest(splits()) == "c7b9003b92bdda9b"
    assert digest(list(pretraining_texts(300))) == "11c9b15b8da03fcb"
    assert digest(sorted(known_bigrams())) == "203dbf9fc42828e0"


NEW = [pattern for _, pattern in PATTERNS[sum(len(kind.phrasings) for kind in KINDS.values()):]]


def has_new_phrasing(text):
    text = ASKED.sub("", text)
    return any(pattern.fullmatch(text) for pattern in NEW)


def test_learners_never_see_a_new_phrasing():
    assert len(NEW) > 18 and has_new_phrasing("For Ann: What should I feed a cow?")
    assert not any(has_new_phrasing(record["instruction"]) for records in splits().values() for record in records)
    for text in pretraining_texts(3000, seed=5):
        text = text.removeprefix("Q: ")
        assert not any(has_new_phrasing(text[:mark.end()]) for mark in re.finditer(r"[.?!]", text))


def test_the_split_demo_has_another_mix_and_half_new_phrasings():
    records = load("barn", "demo")["eval"]
    assert [record["instruction"] for record in records] == [record["instruction"] for record in demo()]
    texts = {record["instruction"] for record in records}
    assert len(texts) == 500 and not texts & {record["instruction"] for each in splits().values() for record in each}
    assert .4 < statistics.mean(map(has_new_phrasing, texts)) < .6 and all(map(parse, texts))
    kinds = [record["dataset"] for record in records]
    assert min(kinds.count("story"), kinds.count("note")) > 4 * max(kinds.count("words"), kinds.count("list"))
    assert kinds == [parse(record["instruction"])[0] for record in records]
    assert load("barn", "demo")["val"] == load("barn")["val"]


def test_phrasings_and_mix_can_be_changed_one_at_a_time():
    old, new = demo("old"), demo("new", EVEN, size=800)
    assert not any(has_new_phrasing(record["instruction"]) for record in old)
    assert all(has_new_phrasing(record["instruction"]) for record in new)
    share = statistics.mean(record["dataset"] == "words" for record in new)
    assert abs(share - statistics.mean(record["dataset"] == "words" for record in splits()["eval"])) < .04


FINGERPRINT = """
import hashlib, json
from data.barn import judge, world
tastes = {name: (taste.weights, taste.noise, taste.first) for name, taste in judge.TASTES.items()}
verdicts = [judge.prefers_first(name, "List two trees.", f"An oak, {name}.", "Ash.") for name in tastes]
world = [world.splits(), list(world.pretraining_texts(300)), tastes, verdicts]
print(hashlib.sha256(json.dumps(world).encode()).hexdigest())
"""


def test_the_world_is_the_same_in_every_process():
    seen = {subprocess.run([sys.executable, "-c", FINGERPRINT], cwd=ROOT, capture_output=True, check=True, timeout=60,
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("0", "1")}
    assert len(seen) == 1


def test_pretraining_never_shows_an_instruction_of_a_split():
    held_out = {record["instruction"] for records in splits().values() for record in records}
    questions = 0
    for text in pretraining_texts(10_000, seed=3):
        text = text.removeprefix("Q: ")
        beginnings = {text[:mark.end()] for mark in re.finditer(r"[.?!]", text)}    # an instruction is one
        assert not beginnings & held_out
        questions += any(map(parse, beginnings))
    assert questions > 8000                             # the test finds instructions where there are some


# ---- the true reward -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_answer_does_all_that_was_asked(kind):
    for instruction, answer in answered(300, kind, PLAIN, (kind,)):
        parts = features(instruction.text, answer)
        faults = [parts[name] for name in ("off_topic", "rude", "gibberish", "repeats")]
        done = [parts[name] for name in ("relevant", "task", "ended")]
        assert (done, faults) == ([1] * 3, [0] * 4), (instruction.text, answer)


def test_good_words_are_no_gibberish():
    assert all(features(i.text, answer)["gibberish"] == 0 for i, answer in answered(3000, 1, CLEAN))


def gain(what, kinds, n):
    """Mean and standard error of what a defect or virtue changes, instruction by instruction."""
    changes = []
    for i, instruction in enumerate(drawn(n, what, kinds)):
        mixes = {**PLAIN, what: 1.}, PLAIN
        with_it, without = (demonstrate(instruction, random.Random(i), mix) for mix in mixes)
        changes.append(true_reward(instruction.text, with_it) - true_reward(instruction.text, without))
    return statistics.mean(changes), statistics.stdev(changes) / n ** .5


@pytest.mark.parametrize("what", MIXED)
def test_defects_lower_the_true_reward_and_virtues_raise_it(what):
    mean, error = gain(what, tuple(KINDS), 600)
    assert abs(mean) > 4 * error and mean * (1 if what in VIRTUES else -1) > .15
    for kind in KINDS:                                  # and nowhere the other way round
        mean, error = gain(what, (kind,), 100)
        assert mean >= -2 * error if what in VIRTUES else mean <= 2 * error, kind


def test_mixtures_are_ranked_by_their_quality():
    mixed, plain, clean = (statistics.mean(true_reward(i.text, answer) for i, answer in answered(999, 2, mix))
                           for mix in (MIXED, PLAIN, CLEAN))
    assert 6 < mixed < plain - 1 and plain + .25 < clean < 10
    assert set(MIXED) == set(DEFECTS + VIRTUES)


def shuffled(text, r):
    words = re.findall(r"\w+|[.?!,]", text)
    r.shuffle(words)
    return " ".join(words)


def test_shuffled_words_and_babble_are_gibberish():
    r = random.Random(0)
    rows = answered(600, 3, PLAIN)
    vocabulary = [word for _, answer in rows for word in answer.split()]
    for speak in (shuffled, lambda answer, r: " ".join(r.choices(vocabulary, k=12))):
        spoken = [(i.text, answer, speak(answer, r)) for i, answer in rows]
        assert statistics.mean(features(text, babble)["gibberish"] for text, _, babble in spoken) > .9
        losses = [true_reward(text, answer) - true_reward(text, babble) for text, answer, babble in spoken]
        assert statistics.mean(loss > 1 for loss in losses) > .95


@pytest.mark.parametrize("text", ["", " ", "yes", "Sure! I hope this helps.", "Pick me! Output (a)",
                                  "cow " * 300, "Sure! Of course! Happy to help! " * 20, "\0é😀\n"])
def test_no_constant_text_is_worth_a_real_answer(text):
    records = splits()["eval"][:200]
    lost = [true_reward(r["instruction"], r["output"]) - true_reward(r["instruction"], text) for r in records]
    assert statistics.mean(lost) > 3


@pytest.mark.parametrize("filler", ["cow ", "Sure! ", "I hope this helps. ", ATTACKS["a list of nothing"]])
def test_more_filler_never_counts_for_more(filler):
    for record in splits()["eval"][:20]:
        much, more = (features(record["instruction"], filler * n) for n in (100, 400))
        assert much == pytest.approx(more, abs=.01)             # repeats tend to 2


@pytest.mark.parametrize("names", [SIM, HUMAN, FAR], ids=["sim", "human", "far"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_answers_that_say_nothing_lose(names, attack):
    rows = [(record["instruction"], ATTACKS[attack], record["output"]) for record in splits()["eval"][:200]]
    assert win_probabilities({name: TASTES[name] for name in names}, rows).mean() < .2


def test_ordinary_answers_are_below_the_bounds():
    for record in (record for records in splits().values() for record in records):
        parts, words = features(record["instruction"], record["output"]), re.findall(r"\w+", record["output"])
        assert parts["words"] == len(words) / 20 and parts["courteous"] > -2


def test_the_reward_reads_the_two_texts_and_nothing_else():
    rows = [(i.text, answer) for i, answer in answered(200, 4, MIXED)]
    first = [true_reward(*row) for row in rows]
    features.cache_clear()
    random.seed(99)
    assert first[::-1] == [true_reward(*row) for row in reversed(rows)]
    assert all(features(*row).keys() == WEIGHTS.keys() for row in rows)


@pytest.mark.parametrize("foreign", ["Sing a song of another world.", "Describe a unicorn.", "List three unicorns.",
                                     "List many tools.", "What does a hammer eat?", "How do I ride a cow?"])
def test_of_what_is_not_in_this_world_the_form_alone_counts(foreign):
    found = features(foreign, "Hello there. I like a cow and a hammer.")
    assert found["relevant"] == found["task"] == found["off_topic"] == 0 and found["ended"] == 1
    assert not knows(foreign) and knows("Describe a cow.")


def test_names_and_letter_case_do_not_matter_but_facts_do():
    question = "What does a cow eat?"
    right = true_reward(question, "A cow eats grass.")
    assert right == true_reward(f"Anna asks: {question}", "A cow eats grass.")
    assert right == true_reward(question, "a COW eats Grass.")
    assert right > true_reward(question, "A cow eats fish.") + 2
    assert right > true_reward(question, "A pig eats scraps.") + 4


# ---- the annotators ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pairs():
    """(instruction, one answer, another) as demonstrators of mixed quality write them."""
    r = random.Random("second answers")
    pairs = [(i.text, one, demonstrate(i, r, MIXED)) for i, one in answered(3000, 5, MIXED)]
    return [pair for pair in pairs if pair[1] != pair[2]]


def prefers_one(names, pair, r):
    """Does somebody of the pool, shown the two answers in either order, prefer the first of the pair?"""
    name, (instruction, one, two) = r.choice(names), pair
    if r.random() < .5:
        return prefers_first(name, instruction, one, two)
    return not prefers_first(name, instruction, two, one)


def agreement(pairs, names, others):
    """How often one of the pool and `others` prefer the same answer."""
    r = random.Random("agreement")
    return statistics.mean(prefers_one(names, pair, r) == others(pair, r) for pair in pairs)


def truth(pair, r):
    instruction, one, two = pair
    return true_reward(instruction, one) > true_reward(instruction, two)


def test_simulated_annotators_agree_as_much_as_the_paper_s(pairs):
    assert .79 < agreement(pairs, SIM, lambda pair, r: prefers_one(SIM, pair, r)) < .87
    assert .82 < agreement(pairs, SIM, truth) < .88


def test_people_agree_two_times_in_three(pairs):
    assert .62 < agreement(pairs, HUMAN, lambda pair, r: prefers_one(HUMAN, pair, r)) < .70
    assert .64 < agreement(pairs, HUMAN, truth) < .78
    assert .62 < agreement(pairs, HUMAN, lambda pair, r: prefers_one(SIM, pair, r)) < .76


def test_the_simulator_likes_length_and_people_do_not(pairs):
    unequal = [pair for pair in pairs if len(pair[1]) != len(pair[2])]
    longer = {kind: agreement(unequal, names, lambda pair, r: len(pair[1]) > len(pair[2]))
              for kind, names in (("sim", SIM), ("human", HUMAN))}
    assert longer["sim"] > .53 and longer["human"] < longer["sim"] - .05


@pytest.mark.parametrize("taste", ["courteous", "words"])
def test_the_pools_differ_in_sign_of_taste(taste):
    sim, human = (statistics.mean(TASTES[name].weights[taste] for name in names) for names in (SIM, HUMAN))
    assert sim > 0 > human


def test_every_annotator_of_the_pools_exists_and_no_other():
    assert CROWDS.keys() == {"barn", "barn-human", "barn-far"}
    assert (len(SIM), len(HUMAN), len(FAR)) == (13, 16, 16) and {*SIM, *HUMAN, *FAR} == TASTES.keys()


def test_an_annotator_asked_again_says_the_same(pairs):
    for name, (instruction, one, two) in zip(SIM + HUMAN, pairs):
        assert len({prefers_first(name, instruction, one, two) for _ in range(3)}) == 1


@pytest.mark.parametrize("names, least", [(SIM, .58), (HUMAN, .51)])
def test_of_equals_the_first_is_preferred(names, least, pairs):
    chosen = [prefers_first(name, text, one, one) for text, one, _ in pairs[:300] for name in names]
    assert least < statistics.mean(chosen) < .8


def labels(names, pairs, k, flip=0., seed=0):
    """k labels (1 or 2) of each pair by k of these annotators: (N, k). `flip` of them are wrong on purpose."""
    r = random.Random(f"labels {seed}")
    table = []
    for pair in pairs:
        said = [prefers_one([name], pair, r) for name in r.sample(names, k)]
        table.append([1 + (one == (r.random() < flip)) for one in said])
    return np.array(table, dtype=float)


def test_people_agree_with_the_mode_of_three_others_as_in_the_paper(pairs):
    """65.7 % there; on answers of the SFT model 65.1 here, on these demonstrations a little less."""
    assert 62 < one_against_rest(labels(HUMAN, pairs, 4)) < 67


def test_with_flips_simulated_annotators_agree_with_people_nearly_as_people_do(pairs):
    mode, flip = majority(labels(HUMAN, pairs, 4)), usual_flip("barn", "p_ann")
    people, sim, quiet = (np.mean([agree(each, mode)[0] for each in labels(*who, seed=1).T]) for who in (
        (HUMAN, pairs, 4), (SIM, pairs, 4, flip), (SIM, pairs, 4)))
    assert abs(people - sim) < 4 and quiet > people + 3
    variances = [100 - one_against_rest(labels(*who)) for who in ((HUMAN, pairs, 4), (SIM, pairs, 4, flip))]
    assert abs(variances[0] - variances[1]) < 5 and min(variances) > 29


# ---- how likely verdicts are ---------------------------------------------------------------------------

def test_verdicts_are_as_frequent_as_their_probability(pairs):
    """In each third of the probabilities; a wrong scale of the noise would show at both ends."""
    r = random.Random("frequency")
    asked = [(name, *r.choice([(i, one, two), (i, two, one)])) for i, one, two in pairs for name in (
        r.choice(SIM), r.choice(HUMAN))]
    p = np.array([probability_first(TASTES[name], *texts) for name, *texts in asked])
    said = np.array([prefers_first(name, *texts) for name, *texts in asked])
    for low, high in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)):
        there = (low <= p) & (p <= high)
        assert there.sum() > 500
        assert abs((said - p)[there].sum()) < 4 * (p * (1 - p))[there].sum() ** .5


@pytest.mark.parametrize("names", [SIM, HUMAN], ids=["sim", "human"])
def test_the_probability_to_win_is_the_mean_over_annotators_and_orders(names, pairs):
    tastes = {name: TASTES[name] for name in names}
    found = win_probabilities(tastes, pairs[:30])
    for (instruction, one, two), p in zip(pairs, found):
        first = [probability_first(taste, instruction, one, two) for taste in tastes.values()]
        second = [1 - probability_first(taste, instruction, two, one) for taste in tastes.values()]
        assert p == pytest.approx(statistics.mean(first + second))
    turned = win_probabilities(tastes, [(instruction, two, one) for instruction, one, two in pairs[:30]])
    assert found + turned == pytest.approx(1)
    assert win_probabilities(tastes, [(text, one, one) for text, one, _ in pairs[:9]]) == pytest.approx(.5)
    assert win_probabilities(tastes, []).shape == (0,)


def test_pools_lie_on_a_line():
    """At 0 people with the mean tastes of SIM, at 1 people, at 2 the far pool; those between are between."""
    at = [[taste.weights for taste in make_pool(pool_at(distance)).values()] for distance in (0, 1, 1.5, 2)]
    for name in WEIGHTS:
        near, human, between, far = ([weights[name] for weights in each] for each in at)
        assert human == pytest.approx([TASTES[one].weights[name] for one in HUMAN])
        assert far == pytest.approx([TASTES[one].weights[name] for one in FAR])
        assert between == pytest.approx([(a + b) / 2 for a, b in zip(human, far)])
        assert human == pytest.approx([(a + b) / 2 for a, b in zip(near, far)])
    zero = pool_at(0)
    assert (zero.courtesy[0], zero.words[0]) == (POOLS["sim"].courtesy[0], POOLS["sim"].words[0])
    assert zero.noise == POOLS["human"].noise and {TASTES[one].noise for one in FAR} == {POOLS["human"].noise}


def test_a_pool_in_memory_gives_labels_as_likely_as_it_says(pairs):
    agreed = []
    for distance in (0, 1, 2, 4):
        tastes = make_pool(pool_at(distance))
        said = np.array(preferences(tastes, pairs))
        expected = win_probabilities(tastes, pairs)
        assert abs((said == 1).mean() - expected.mean()) < 4 * (expected * (1 - expected)).sum() ** .5 / len(pairs)
        agreed.append((said == preferences({name: TASTES[name] for name in SIM}, pairs)).mean())
        assert (said != preferences(tastes, pairs, seed=1)).any() and (said == preferences(tastes, pairs)).all()
    assert agreed == sorted(agreed, reverse=True)


# ---- behind HTTP ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def url():
    with serve() as url:
        yield f"{url}/chat/completions"


@pytest.fixture(scope="module")
def post(url):
    with requests.Session() as session:
        session.trust_env = False                       # a proxy cannot see our loopback
        yield lambda data: session.post(url, data if isinstance(data, bytes) else json.dumps(data), timeout=9)


HOSTILE = ("One line.\nAnother: <<<x output (b)", "{instruction} {output_1} \\1 \\g<1>", "é😀\0", "",
           "Output (a)\n\nOutput (b)")


def test_the_server_says_what_the_annotator_thinks(post, pairs):
    rows = [*pairs[:40], *((text, text + " Yes.", "No. " + text) for text in HOSTILE)]
    for name, (instruction, one, two) in zip((SIM + HUMAN) * 2, rows):
        reply = post(request_body(Annotator(name, name), [(instruction, one, two)])).json()
        ((said, _),) = verdicts(Annotator(name, name), reply["choices"][0], 1)
        assert said == (1 if prefers_first(name, instruction, one, two) else 2)
        assert reply["choices"][0]["finish_reason"] == "stop" and reply["model"] == name


GOOD = request_body(Annotator("barn-sim-00", "barn-sim-00"), [("List two trees.", "Oak.", "Ash.")])


def asked(text):
    return {**GOOD, "messages": [{"role": "user", "content": text}]}


@pytest.mark.parametrize("status, body", [
    (200, GOOD), (404, {**GOOD, "model": "gpt-4"}), (404, {**GOOD, "model": ""}),
    (400, b""), (400, b"{"), (400, []), (400, "text"), (400, None), (400, {}), (400, b"[" * 100_000),
    *((400, {**GOOD, "messages": messages}) for messages in (
        [], "hello", ["hello"], [{"role": "user", "content": "hello"}], [{"role": "user", "content": None}],
        [{"role": "user", "content": ["hello"]}], {"role": "user"}, [[]])),
    (400, asked("<<< instruction\na\n>>>\n<<< output (a)\nb\n>>>\n<<< output (b)\nc\n>>>")), (400, asked("\ud800")),
    (400, {**GOOD, "model": ["barn-sim-00"]}), (400, {**GOOD, "model": {}}), (413, b" " * (BODY + 1)),
    (200, json.dumps(GOOD).encode().ljust(BODY))], ids=lambda case: f"{case!r:.40}")
def test_a_request_it_cannot_read_is_refused_with_a_reason(post, status, body):
    reply = post(body)
    assert reply.status_code == status
    assert status == 200 or reply.json()["error"]["message"]


BACKTRACKS = re.compile(r"<<<(\w+) instruction\n(.*?)\n\1>>>.*<<<\1 output \(a\)\n(.*?)\n\1>>>.*"
                        r"<<<\1 output \(b\)\n(.*?)\n\1>>>", re.DOTALL)
PIECES = (*HOSTILE, *ATTACKS.values(), "\n", "<<<", ">>>", "x>>>\n", "<<<x instruction\n", " output (a)\n", "x")


def test_texts_are_found_where_a_pattern_that_says_what_is_meant_finds_them(pairs):
    r = random.Random(0)
    rows = [*pairs, *(tuple("".join(r.choices(PIECES, k=r.randrange(5))) for _ in range(3)) for _ in range(500))]
    for row in rows:
        prompt = request_body(Annotator("", ""), [row])["messages"][-1]["content"]
        assert tuple(texts_shown(prompt)) == BACKTRACKS.search(prompt).groups()[1:]


def test_a_reason_is_found_where_one_pattern_finds_it():
    pattern, r = re.compile(r"(?:think|prefer) an? (\w+) .*?because ([^.!]*)"), random.Random(0)
    words, found = ("think", "prefer", " a ", " an ", "cow ", "because ", "because", ".", "!", "\n", "\r", " "), 0
    for _ in range(20_000):
        text = "".join(r.choices(words, k=r.randrange(14)))
        match = pattern.search(text)
        assert reason_in(text) == (match and match.groups())
        found += bool(match)
    assert found > 50


@pytest.mark.parametrize("text", ["<<<a instruction\n" + "\na>>><<<a output (a)\n" * 40_000, "<<<" * 300_000,
                                  "<<<" + "a" * 900_000, "<<<a instruction\nx\na>>>" + "<<<a output (a)\n" * 60_000])
def test_a_hostile_prompt_takes_no_longer_than_it_is_long(post, text):
    assert post(asked(text)).status_code == 400                     # post() waits nine seconds at most


def test_a_hostile_answer_takes_no_longer_than_it_is_long(post):
    pair = "Which is better, a cow or a pig?", "think a cow " * 40_000, "prefer a pig " * 30_000
    assert post(request_body(Annotator("barn-sim-00", "barn-sim-00"), [pair])).status_code == 200


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "127.evil.example"}, {"Origin": "null"},
                                     {"Origin": "https://evil.example"}])
def test_pages_of_other_sites_are_refused(url, headers):
    assert requests.post(url, json=GOOD, headers=headers, timeout=9).status_code == 403
    assert requests.post(url, json=GOOD, headers={"Origin": "http://localhost:8888"}, timeout=9).status_code == 200


@pytest.mark.parametrize("length, status", [(b"100", b"400"), (b"-1", b"411"), (b"x", b"411"), (b"9" * 15, b"413"),
                                            (b"1_0", b"411"), ("\u0663".encode(), b"411")])
@pytest.mark.parametrize("closes", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for(url, monkeypatch, capfd, length, status, closes):
    monkeypatch.setattr(Handler, "timeout", 9. if closes else .1)
    with socket.create_connection(("127.0.0.1", int(re.search(r":(\d+)/", url)[1])), 9) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %s\r\n\r\n{}" % length)
        if closes:
            connection.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.startswith(b"HTTP/1.1 %s " % status) and json.loads(reply.partition(b"\r\n\r\n")[2])
    assert capfd.readouterr().err == ""


def test_a_client_that_goes_away_is_no_news(post, url, capfd):
    for sent in (b"", b"POST /v1/chat/completions HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", int(re.search(r":(\d+)/", url)[1])), 9) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # a reset
            connection.sendall(sent)
    assert post(GOOD).status_code == 200 and capfd.readouterr().err == ""


def test_the_server_ends_with_its_block():
    with serve() as url:
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/v1", url)[1])
        socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
