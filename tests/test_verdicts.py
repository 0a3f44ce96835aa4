"""What a reply means: every dress of a verdict that can be read in one way, and none that can be read in two."""
import json
import math
import random
import re

import pytest
from commands import said
from judged import ask, longer, make_pairs, prefer_longer, preferences

from annotate import annotate as label
from data.judges.prompts import Annotator, paper_pool, request_body, single
from data.judges.verdicts import letter_preference, read, verdicts, without_thought

FORMS = ["letter", "numbered", "json"]


def other(text):
    """The same text with a for b and b for a."""
    swap = dict(zip("abABａｂ", "baBAｂａ"))
    return re.sub(r"(?<![^\W_])[abAB](?![^\W_])|[ａｂ]", lambda match: swap[match[0]], text)


ONE = ["Output (a)", " output (A)\n", "**Output (a)**.", "(a)", "a", "A.", '"Output (a)"', "`Output (a)`",
       "> Output (a)", "```\nOutput (a)\n```", "### Output a", "OUTPUT (A)", "Output (a)!!", "Option (a)", "[[A]]",
       r"\boxed{a}", r"$\boxed{\text{a}}$", "Answer: Output (a)", "The better output is Output (a)",
       "Output (a) is better",
       "The better one: Output (a)", "I prefer Output (a).", "The winner is [[A]]", "Verdict: **a**",
       "Output (a)\nIt is friendlier.", "Output (a)\n\nThe text is not long, but good.", "It is right.\n\nOutput (a)",
       "Output (a) because it is right", "Output (a), since it is right.", "Output (a) - it answers the question.",
       "Output (a)<|im_end|>", "Output (a)</s>", "<|im_start|>assistant\nOutput (a)<|im_end|>",
       "1: Output (a)", "Pair 1: a", "| 1 | Output (a) |", '{"better":"a"}', '{"Pair": "1", "Better": "Output (a)"}',
       '```json\n{"better": "a"}\n```\nLet me know if you need more!', '{"pairs": [{"pair": 1, "better": "a"}]}',
       "Output （a）", "Output （ａ）", "输出（a）更好", "答案：（a）", "出力(a)の方が良い", "La mejor es (a)",
       "Ausgabe (a) ist besser.",
       "La meilleure réponse est (a)", "Ответ: (a)"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reply", ONE)
def test_a_verdict_in_any_dress(reply, form):
    assert read(reply, form, 1) == {1: "a"}
    assert read(other(reply), form, 1) == {1: "b"}


NONE = ["", "both", "neither", "Output (a) or Output (b)", "Output (c)", "ab", "1", "I think Output (b)", "Output",
        "Output (a)\nOutput (b)", "Output (a)?", "Is (a) better?", "Output (a) is worse", "Output (a) loses",
        "A is wrong",
        "Not Output (a)", "Output (a) is not better", "The better answer is not Output (a)",
        "The worse one: Output (a)",
        "Output (a): wrong", "Output (a), not", "1: (a), inferior", "Output (a), sadly, misses it", "(a): weaker",
        "Output (a) is better than Output (b)", "(a) > (b)", "a and b", "a/b",
        "A better answer", "A good answer.", "Answer a question", "Output (a)\nWait, no: the second.",
        "Output (a)\nActually, B is better.", "Output (a)\nThe second one is better", "Output (a)\nSorry, Output (b).",
        "Output (a)\nNo, the other is better.", "Neither is good, Output (a)", "The other one", "[[A]] [[B]]",
        "It lacks a proof. The following is bad:\nOutput (a)", "输出（a）更差", "1. (b) is friendlier.",
        "0: Output (a)", "2: Output (a)", "1: Output (a)\n0: Output (b)", "1: Output (a)\nOutput (b)",
        "Output (b)\n1: Output (a)", '{"better": "both"}', '{"pair": 0, "better": "a"}',
        '{"pair": true, "better": "a"}',
        '[{"pair": 1, "better": "a"}, {"pair": 1, "better": "b"}]', '{"better":"a"}\n{"better":"b"}',
        '{"better":"a"}\nWait, (b).', "[1, 2]", '[{"pair": 1',
        "Reply with exactly `Output (a)` or `Output (b)` and nothing else."]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reply", NONE)
def test_what_can_be_read_in_two_ways_or_in_none_is_no_verdict(reply, form):
    assert read(reply, form, 1) == read(other(reply), form, 1) == {}


MANY = {"1: Output (a)\n2. (b)\n**3:** b\nPair 4: Output (A).\n5) b": "abbab", "1: Output (a), 2: Output (b)": "ab",
        "(b) is friendlier.\n1: Output (b)\n\n144 is right.\n2: Output (a)": "ba", "1. a; 2. b; 3. a": "aba",
        "| Pair | Better |\n|---|---|\n| 1 | Output (a) |\n| 2 | (b) |": "ab", "1: （a）\n2：输出（b）更好": "ab",
        "| 1 | Output (a) | it is right |\n| 2 | Output (b) | short |": "ab", "#1: (a)\n#2: (b)": "ab",
        "1: Output (a) because it is right\n2: Output (b) - short": "ab", "1 - Output (a)\n2 - Output (b)": "ab",
        "**Pair 1**: Output (a)\n**Pair 2**: Output (b)": "ab", "1 Output (a)\n2 Output (b)": "ab",
        '[{"pair": "1", "better": "A"}, {"Pair": 2, "better": "Output (b)"}]': "ab",
        '{"pairs": [{"pair": 1, "better": "a"}, {"pair": 2, "better": "b"}]}': "ab",
        "Here:\n```json\n[{'pair': 1, 'reason': 'it\\'s', 'better': 'a'}, {'pair': 2, 'better': 'b'}]\n```\nOk.": "ab",
        '[{"better": "a"}, {"better": "b"}]': "ab",
        '[{"pair": 2, "reason": "it says \\": true\\"", "better": "b"}, {"pair": 1, "better": "Output (a)"}]': "ab"}


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("reply", MANY)
def test_verdicts_on_several_pairs(reply, form):
    assert read(reply, form, len(MANY[reply])) == dict(enumerate(MANY[reply], 1))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("reply", [
    "0: Output (a)\n1: Output (b)", "1: Output (a)\n2: Output (b)\n3: Output (a)", "1: (a)\n1: (b)\n2: both",
    '[{"pair":0,"better":"a"},{"pair":1,"better":"b"}]', '[{"better":"a"}]', '[{"pair":1,"better":"a"},{"better":"b"}]',
    "1: Output (a)\n2: Output (b)\nWait, the first should be (b).", "Output (a)\nOutput (b)"])
def test_numbers_that_do_not_fit_are_no_verdict_on_the_neighbours(reply, form):
    assert read(reply, form, 2) == {}


@pytest.mark.parametrize("annotator", [*paper_pool(["m"]), *single("m"), Annotator("m", "m")], ids=lambda one: one.name)
def test_an_echo_of_the_prompt_gives_none(annotator):
    pairs = [("Say moo.", "moo", "1: Output (a)"), ("Say.", "Output (b)", "x")][:annotator.batch]
    messages = [message["content"] for message in request_body(annotator, pairs)["messages"]]
    for echo in ("\n".join(messages), messages[-1], messages[-1] + " Output (a)"):
        assert verdicts(annotator, {"message": {"content": echo}}, len(pairs)) == len(pairs) * [(None, "no verdict")]


def test_no_reply_takes_long_to_read():
    """Each of these would take hours if a pattern could go back to every place it has been."""
    for reply in ("*" * 90_000, "Output " * 13_000, "(" * 299, "> " * 149, "better " * 40, "{" * 90_000, "1" * 90_000,
                  "[" * 5000 + "]" * 5000, "1: " * 30_000, "B " * 45_000, "'" * 90_000, "A, B, " * 15_000,
                  "1: a " + "x y" * 10_000_000):
        for form in FORMS:
            assert read(reply, form, 1) == {}


# ---- thoughts ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reply, kept", [
    ("<think>\n\n</think>\n\nb", "b"), ("<think>Output (a)</think>Output (b)", "Output (b)"),
    ("<thinking>(a)</thinking>\nb", "b"), ("<REASONING>a</REASONING> b", "b"), ("[THINK]a[/THINK]b", "b"),
    ("perhaps (a)</think>\nOutput (b)", "Output (b)"), ("<think>a<think>b</think>a</think>b", "b"),
    ("<|channel|>analysis<|message|>(a)<|end|><|start|>assistant<|channel|>final<|message|>Output (b)", "Output (b)"),
    ("<|channel>thought\n(a)<channel|>b", "b"), ("<think>Output (a)</think>\nI don't know", "I don't know"),
    ("Output (a)", "Output (a)")])
def test_a_thought_is_taken_off(reply, kept):
    assert (without_thought(reply)[0].strip(), without_thought(reply)[1]) == (kept, False)


def cause(message, usage=None, **choice):
    return verdicts(Annotator("m", "m"), {"message": {"content": "", **message}, **choice}, 1, usage=usage)[0]


def test_a_thought_is_never_a_verdict():
    draft = "At first sight:\nOutput (a)\nBut wait"
    for message, more in (({"content": f"<think>{draft}"}, {}), ({"content": draft}, {"finish_reason": "length"}),
                          ({"content": "Output (a)"}, {"finish_reason": "length"}),
                          ({"content": f"b\n<think>{draft}"}, {}),
                          ({"content": None, "reasoning_content": draft}, {}), ({"reasoning": draft}, {}),
                          ({"content": [{"type": "thinking", "thinking": draft}]}, {"finish_reason": "length"}),
                          ({}, {"usage": {"completion_tokens_details": {"reasoning_tokens": 9}}})):
        assert cause(message, **more) == (None, "cut off"), message
    assert cause({"content": f"<think>{draft}</think>\nHm."}) == (None, "no verdict")
    assert cause({"content": [{"type": "thinking", "thinking": draft}, {"type": "text", "text": "b"}]}) == (2, "")
    assert cause({"content": "Output (b)", "reasoning_content": draft}) == (2, "") and cause({}) == (None, "empty")


# ---- log-probabilities ---------------------------------------------------------------------------------

def soft(*tops, letter="b"):
    """The preference of a verdict (b) whose deciding token has these alternatives, (token, log-probability)."""
    tokens = [{"token": letter, "logprob": -1, "top_logprobs": [dict(zip(("token", "logprob"), top)) for top in tops]}]
    return verdicts(Annotator("m", "m"), {"message": {"content": "b"}, "logprobs": {"content": tokens}}, 1)[0][0]


@pytest.mark.parametrize("nothing", [None, -math.inf, -9999, math.nan])
def test_log_probabilities_that_are_none(nothing):
    assert soft(("a", nothing), ("b", -.5)) == 2 and soft(("a", -1.), ("b", -1.), ("c", nothing)) == 1.5
    for missing in ([], None, {}, {"content": None}, {"content": [{"token": "b"}]}, {"content": [{"token": None}]},
                    {"content": [{"token": "b", "top_logprobs": None}]}, {"content": [{"token": "b", "top_logprobs": [
                        {"token": "b"}]}]}):
        assert letter_preference({"logprobs": missing}, "b") is None


def test_a_letter_in_a_reason_is_not_the_deciding_one():
    tokens = [{"token": letter, "top_logprobs": [{"token": letter, "logprob": -.1}]} for letter in ("b", " a")]
    choice = {"message": {"content": "Output (b)\nIt is a good answer."}, "logprobs": {"content": tokens}}
    assert verdicts(Annotator("m", "m"), choice, 1) == [(2, "")] and soft(("a", -.1), letter="a") == 2


# ---- what is asked again -------------------------------------------------------------------------------

def asked_once_more(body):
    return re.search(r"I read no verdict|Reply with exactly `[1\[]", body["messages"][-1]["content"])


def test_a_reply_without_a_verdict_is_asked_for_once_more_in_the_same_conversation(server, judge):
    server.rule = lambda body, nth: longer(body, nth) if asked_once_more(body) else "Well, <|im_end|> both have merits."
    pairs = make_pairs(10)
    assert preferences(ask(pairs, judge())) == [prefer_longer(pair) for pair in pairs]
    roles = [[message["role"] for message in body["messages"]] for body in server.requests]
    assert roles == 10 * [["system", "user"]] + 10 * [["system", "user", "assistant", "user"]]
    assert server.requests[-1]["messages"][2]["content"] == "Well, < |im_end|> both have merits."
    assert "`Output (a)` or `Output (b)`" in server.requests[-1]["messages"][-1]["content"]
    assert server.requests[-1]["messages"][:2] in [body["messages"] for body in server.requests[:10]]


REASONS = ["\nIt is friendlier.", " is better because it is right.", ", since it answers what was asked.",
           " because (a) is wrong.", "\nOutput (a) does not answer the question.", " - shorter, and right",
           "\n\nBoth are fluent, but this one is right."]


@pytest.mark.parametrize("annotator", [Annotator("m", "m"), *single("m"), paper_pool(["m"])[0]],
                         ids=lambda one: one.prompt)
def test_a_judge_that_explains_only_its_bs_loses_nothing(server, judge, annotator):
    """A loss that depends on the verdict would turn the labels: what is kept must not prefer the first answer."""
    def rule(body, nth):
        if asked_once_more(body):
            return longer(body, nth)
        verdict, r = said(body, lambda instruction, a, b: "a" if len(a) > len(b) else "b"), random.Random(str(body))
        if verdict.startswith("["):
            items = json.loads(verdict)
            return json.dumps([{**item, "better": item["better"] + r.choice(REASONS) * (item["better"] == "b")}
                               for item in items])
        return re.sub(r"\(b\)", lambda match: match[0] + r.choice(REASONS), verdict)

    server.rule, pairs = rule, make_pairs(150)
    records = label(pairs, [annotator], judge())
    assert preferences(records) == [prefer_longer(pair) for pair in pairs]
