"""The generator of the offline world: instructions, demonstrations of mixed quality, and splits, from fixed seeds.

An instruction is made by filling the slots of a phrasing, such as "Describe {a_x}.". parse() does the reverse: it finds
the phrasing and the slots of an instruction, so that the reward can be computed from the text alone.
`python -m data.barn.world` prints some demonstrations.
"""
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from data.barn.lexicon import (ANIMALS, CATEGORIES, CATEGORY_OF, CLOSINGS, FRUITS, ISSUES, NAMES, NUMBERS, OPENINGS,
                               PLACES, REQUESTS, RUDE, SINGULAR, STEPS, TOOLS, VEGETABLES, steps)

THINGS = (*ANIMALS, *VEGETABLES, *FRUITS, *TOOLS)          # the words that have properties
# Records of each split: a fifth of AlpacaFarm's, but for eval, which has as many.
SIZES = {"sft": 2000, "preference": 2000, "unlabeled": 4000, "val": 400, "eval": 805}


def an(x):
    """A word with its indefinite article."""
    return f"an {x}" if x[0] in "aeio" else f"a {x}"        # no thing here begins with u


def cap(text):
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Instruction:
    """An instruction and what it was made from."""
    kind: str                   # a key of KINDS
    slots: dict                 # {slot: word}
    text: str


@dataclass(frozen=True)
class Kind:
    """A kind of instruction."""
    phrasings: tuple            # {x} is the word in slot x, {a_x} the word with its article
    draw: Callable              # random.Random -> slots
    answer: Callable            # slots, random.Random -> sentences of a good answer
    share: float = 1.0          # how often this kind is drawn, relative to the others
    asked_for: bool = True      # whether the text may begin with "Anna asks: "
    new: tuple = ()             # phrasings that no learner has ever seen


# -- the kinds of instruction: for each, a function that draws the slots and one that writes a good answer ---------

def draw_list(r):
    return {"n": r.choice(list(NUMBERS)), "category": r.choice(list(CATEGORIES))}


def answer_list(s, r):
    items = r.sample(CATEGORIES[s["category"]], s.get("count", NUMBERS[s["n"]]))
    if r.random() < .6:
        return [" ".join(f"{i}. {item}" for i, item in enumerate(items, 1))]
    return [cap(", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]) + "."]


def draw_thing(r):
    return {"x": r.choice(THINGS)}


def answer_describe(s, r):
    x = s["x"]
    if x in ANIMALS:
        eats, lives, gives, *traits = ANIMALS[x]
        return [f"{cap(an(x))} is {an(traits[0])} and {traits[1]} animal.", f"It lives in the {lives} and eats {eats}.",
                f"It gives us {gives}."]
    if x in TOOLS:
        return [f"{cap(an(x))} is {an(TOOLS[x][1])} tool.", f"You can {TOOLS[x][0]} with it.", "Keep it in the barn."]
    colour, taste = VEGETABLES.get(x) or FRUITS[x]
    return [f"{cap(an(x))} is {an(colour)} {SINGULAR[CATEGORY_OF[x]]}.", f"It tastes {taste}.",
            f"It grows in the {'garden' if x in VEGETABLES else 'orchard'}."]


def draw_story(r):
    x = r.choice(list(ANIMALS))
    return {"x": x, "y": r.choice([y for y in (*ANIMALS, *TOOLS, *FRUITS) if y != x])}


def answer_story(s, r):
    x, y = s["x"], s["y"]
    place, trait = r.choice(PLACES), r.choice(ANIMALS[x][3:])
    start = r.choice([f"Once there was {an(trait)} {x}.", f"{cap(an(trait))} {x} lived near the {place}."])
    if y in ANIMALS:
        middle = [r.choice([f"One day it met {an(y)} at the {place}.", f"One day it passed {an(y)} by the {place}."]),
                  r.choice([f"The {x} and the {y} became friends.", f"The {x} and the {y} walked home together."])]
    else:
        middle = [r.choice([f"One day it found {an(y)} at the {place}.", f"It wanted {an(y)} from the {place}."]),
                  r.choice([f"The {x} kept the {y} for a long time.",
                            f"The {x} shared the {y} with {r.choice(NAMES)}."])]
    return [start, *middle, r.choice(["They were very happy.", "The end.", "Everyone on the farm was glad."])]


def draw_polite(r):
    return {"verb": r.choice(REQUESTS), "x": r.choice((*TOOLS, *FRUITS, *VEGETABLES))}


def answer_polite(s, r):
    return [r.choice(["Could you please {verb} the {x}?", "Would you kindly {verb} the {x}, please?",
                      "Please {verb} the {x} when you have time."]).format(**s)]


def draw_how(r):
    verb = r.choice(list(STEPS))
    return {"verb": verb, "x": r.choice(STEPS[verb][1])}


def answer_how(s, r):
    first, second, third, last = steps(s["verb"], s["x"])
    return [f"First, {first}.", f"Then, {second}.", f"Next, {third}.", f"Finally, {last}."]


def draw_opinion(r):
    x, y = r.sample(CATEGORIES[r.choice(["animals", "vegetables", "fruits", "tools"])], 2)
    return {"x": x, "y": y}


def answer_opinion(s, r):
    x = s["x"] if r.random() < .5 else s["y"]
    if x in TOOLS:
        reason = f"you can {TOOLS[x][0]} with it"
    else:
        reason = "it is " + r.choice(ANIMALS[x][3:] if x in ANIMALS else VEGETABLES.get(x) or FRUITS[x])
    return [r.choice([f"I think {an(x)} is better because {reason}.", f"I prefer {an(x)} because {reason}."])]


def draw_animal(r):
    return {"x": r.choice(list(ANIMALS))}


def draw_note(r):
    return {"name": r.choice(NAMES), "issue": r.choice(list(ISSUES))}


def answer_note(s, r):
    return [f"Dear {s['name']},",
            r.choice([f"I noticed the {s['issue']} today.", f"I am writing about the {s['issue']}."]),
            f"Could you please {ISSUES[s['issue']]}?", r.choice(["Best wishes.", "Thank you very much."])]


def draw_words(r):
    words = [r.choice(list(ANIMALS)), r.choice(list(TOOLS)), r.choice(PLACES)]
    r.shuffle(words)
    return dict(zip("xyz", words))


def answer_words(s, r):
    by = {CATEGORY_OF[word]: word for word in s.values()}
    return [r.choice(["The {animals} found the {tools} near the {places}.",
                      "We took the {animals} and the {tools} to the {places}.",
                      "The {tools} by the {places} belongs to the {animals}."]).format(**by)]


def draw_category(r):
    x = r.choice(THINGS)
    categories = [SINGULAR[c] for c in ("animals", "vegetables", "fruits", "tools")]
    return {"x": x, "category": r.choice([SINGULAR[CATEGORY_OF[x]], r.choice(categories)])}


def answer_category(s, r):
    truth = SINGULAR[CATEGORY_OF[s["x"]]]
    return [f"{'Yes' if truth == s['category'] else 'No'}, {an(s['x'])} is {an(truth)}."]


KINDS = {
    "list": Kind(("List {n} {category}.", "Name {n} {category}.", "Give me {n} {category}.",
                  "Tell me {n} {category} you know.", "What are {n} {category} on a farm?"), draw_list, answer_list,
                 new=("Which {n} {category} come to mind?", "Write down {n} {category}.")),
    "describe": Kind(("Describe {a_x}.", "What is {a_x}?", "Tell me about {a_x}.", "Explain what {a_x} is."),
                     draw_thing, answer_describe,
                     new=("What can you say about {a_x}?", "Give a description of {a_x}.")),
    "story": Kind(("Write a short story about {a_x} and {a_y}.", "Tell a story with {a_x} and {a_y}.",
                   "Make up a tale about {a_x} and {a_y}."), draw_story, answer_story, asked_for=False,
                  new=("Invent a little story in which {a_x} meets {a_y}.", "Let us hear about {a_x} and {a_y}.")),
    "polite": Kind(tuple(f"{start}: {{verb}} the {{x}}!" for start in
                         ("Rewrite this politely", "Say it nicely", "Make this polite", "Say this in a kind way",
                          "How can I say this politely", "Turn this into a polite request")),
                   draw_polite, answer_polite, asked_for=False,
                   new=("Put this in friendly words: {verb} the {x}!",
                        "Ask for this with good manners: {verb} the {x}!")),
    "how": Kind(("How do I {verb} {a_x}?", "Explain how to {verb} {a_x}.", "Give me steps to {verb} {a_x}."),
                draw_how, answer_how,
                new=("What must I do to {verb} {a_x}?", "Show me the way to {verb} {a_x}.")),
    "opinion": Kind(("Which is better, {a_x} or {a_y}?", "Should I get {a_x} or {a_y}?",
                     "Do you prefer {a_x} or {a_y}?"), draw_opinion, answer_opinion, asked_for=False,
                    new=("Would you rather have {a_x} or {a_y}?", "Help me choose between {a_x} and {a_y}.")),
    "eats": Kind(("What does {a_x} eat?", "What food is good for {a_x}?"), draw_animal,
                 lambda s, r: [f"{cap(an(s['x']))} eats {ANIMALS[s['x']][0]}."], share=1 / 3,
                 new=("What should I feed {a_x}?",)),
    "lives": Kind(("Where does {a_x} live?", "Where can I find {a_x}?"), draw_animal,
                  lambda s, r: [f"{cap(an(s['x']))} lives in the {ANIMALS[s['x']][1]}."], share=1 / 3,
                  new=("Where is the home of {a_x}?",)),
    "gives": Kind(("What does {a_x} give us?", "What do we get from {a_x}?"), draw_animal,
                  lambda s, r: [f"{cap(an(s['x']))} gives us {ANIMALS[s['x']][2]}."], share=1 / 3,
                  new=("What do people keep {a_x} for?",)),
    "note": Kind(tuple(f"{start} to {{name}} about the {{issue}}." for start in
                       ("Write a note", "Write", "Leave a message", "Please write", "Write a short letter",
                        "Help me write", "Send a note", "Draft a message", "I need a letter",
                        "Please send a few words")),
                 draw_note, answer_note, asked_for=False,
                 new=("Compose a message for {name} about the {issue}.", "Let {name} know about the {issue}.")),
    "words": Kind(("Use these words in a sentence: {x}, {y}, {z}.", "Write a sentence with {x}, {y} and {z}."),
                  draw_words, answer_words, asked_for=False,
                  new=("Make one sentence out of {x}, {y} and {z}.", "Say something with the words {x}, {y} and {z}.")),
    "category": Kind(("Is {a_x} {a_category}?", "Is it true that {a_x} is {a_category}?"),
                     draw_category, answer_category,
                     new=("Can {a_x} be called {a_category}?", "Does {a_x} count as {a_category}?")),
}
# Factors of the kinds' shares: all alike, and those of the split `demo`.
EVEN = dict.fromkeys(KINDS, 1)
DEMO = {"list": .4, "describe": 2, "story": 3, "polite": .5, "how": 2, "opinion": 2, "eats": .4, "lives": .4,
        "gives": .4, "note": 3, "words": .3, "category": .3}
ASKERS = ("{name} asks: ", "My friend {name} wants to know: ", "For {name}: ")


def draw_instruction(r, kinds=tuple(KINDS), mix=EVEN, phrasings="old"):
    """A random Instruction; each kind is drawn in proportion to its share. r: a random.Random.

    mix: {kind: factor of its share}. phrasings: old (which learners see), new, or both (half of each).
    """
    kind = r.choices(kinds, [KINDS[k].share * mix[k] for k in kinds])[0]
    slots = KINDS[kind].draw(r)
    new = phrasings == "new" or phrasings == "both" and r.random() < .5
    phrasing = r.choice(KINDS[kind].new if new else KINDS[kind].phrasings)
    text = phrasing.format(**slots, **{f"a_{k}": an(v) for k, v in slots.items()})
    if KINDS[kind].asked_for and r.random() < .6:           # makes enough unique texts of the kinds with few words
        text = r.choice(ASKERS).format(name=r.choice(NAMES)) + text
    return Instruction(kind, slots, text)


def _pattern(phrasing):
    """The regular expression that finds the slots of a phrasing in a text. A slot has one word or two."""
    parts = re.split(r"\{(\w+)\}", phrasing)
    for i in range(1, len(parts), 2):
        name = parts[i].removeprefix("a_")
        parts[i] = (r"an? " if parts[i] != name else "") + rf"(?P<{name}>\w+(?: \w+)?)"
    parts[::2] = map(re.escape, parts[::2])
    return re.compile("".join(parts))


PATTERNS = [(kind, _pattern(phrasing)) for phrasings in ("phrasings", "new") for kind, k in KINDS.items()
            for phrasing in getattr(k, phrasings)]
ASKED = re.compile("|".join(re.escape(asker).replace(r"\{name\}", r"\w+") for asker in ASKERS))


@lru_cache(None)
def parse(text):
    """(kind, slots) of the text of an instruction, or None if it has no phrasing of this world."""
    text = ASKED.sub("", text, count=1) if ASKED.match(text) else text
    for kind, pattern in PATTERNS:
        if match := pattern.fullmatch(text):
            return kind, match.groupdict()
    return None


# -- demonstrations: a good answer, then defects and additions, each drawn independently ---------------------------

# {defect or addition: its probability}
MIXED = {"wrong": .14, "count": .16, "repeat": .14, "ramble": .12, "rude": .12, "cut": .12,
         "opening": .25, "detail": .35, "closing": .2}
CLEAN = {**dict.fromkeys(MIXED, 0.), "opening": .5, "detail": .6, "closing": .3}
PLAIN = dict.fromkeys(MIXED, 0.)


def about(x, r):
    """A random true sentence about the thing x."""
    if x in ANIMALS:
        eats, lives, gives, *traits = ANIMALS[x]
        return cap(an(x)) + r.choice([f" eats {eats}.", f" lives in the {lives}.", f" gives us {gives}.",
                                      f" is {traits[0]} and {traits[1]}."])
    if x in TOOLS:
        return r.choice([f"You can {TOOLS[x][0]} with {an(x)}.", f"{cap(an(x))} is {TOOLS[x][1]}."])
    if x in CATEGORIES["vegetables"] or x in CATEGORIES["fruits"]:
        colour, taste = VEGETABLES.get(x) or FRUITS[x]
        return cap(an(x)) + r.choice([f" is {colour}.", f" tastes {taste}."])
    return f"The {x} is on the farm."


def _wrong(kind, slots, r):
    """The slots with one word replaced: an answer to them answers another question, which is the most frequent mistake
    of small models."""
    def other(options, than):
        return r.choice([o for o in options if o != than])
    if kind == "list":
        return {**slots, "category": other(CATEGORIES, slots["category"])}
    if kind == "note":
        return {**slots, "issue": other(ISSUES, slots["issue"])}
    x = slots["x"]
    alike = STEPS[slots["verb"]][1] if kind == "how" else CATEGORIES[CATEGORY_OF[x]]
    if kind == "category":                                   # an answer about a thing of another category
        return {**slots, "x": r.choice([t for t in THINGS if CATEGORY_OF[t] != CATEGORY_OF[x]])}
    return {**slots, "x": other([t for t in alike if t != slots.get("y")], x)}


def demonstrate(instruction, r, mix=MIXED):
    """The text of an answer to an Instruction: a good answer, with defects and additions drawn by the rates of `mix`.

    r: a random.Random. mix: MIXED (as people write), CLEAN (additions only), or PLAIN (neither).
    """
    kind, slots = instruction.kind, instruction.slots
    said = dict(slots)
    if r.random() < mix["wrong"]:
        said = _wrong(kind, slots, r)
    miscount = r.random() < mix["count"]
    if miscount and kind == "list":
        said["count"] = max(1, NUMBERS[said["n"]] + r.choice([-2, -1, 1, 2]))
    sentences = KINDS[kind].answer(said, r)
    if miscount and kind != "list":
        sentences = sentences[:max(1, len(sentences) - r.choice([1, 2]))]
    if kind not in ("story", "polite", "note") and r.random() < mix["detail"]:
        detail = about(slots["x"], r) if kind != "list" else r.choice(
            ["All of them are useful on a farm.", "You can see them every day.", "I like the first one best."])
        sentences += [detail] * (detail not in sentences)
    if r.random() < mix["repeat"]:
        i = r.randrange(len(sentences))
        sentences = sentences[:i + 1] + [sentences[i]] * r.choice([1, 1, 2]) + sentences[i + 1:]
    if r.random() < mix["ramble"]:
        sentences += [about(r.choice(list(CATEGORY_OF)), r) for _ in range(r.choice([1, 2, 3]))]
    if r.random() < mix["rude"]:
        sentences.insert(0 if r.random() < .6 else len(sentences), r.choice(RUDE))
    else:
        if kind not in ("polite", "note") and r.random() < mix["opening"]:
            sentences = [r.choice(OPENINGS)] + sentences
        if kind != "note" and r.random() < mix["closing"]:
            sentences += [r.choice(CLOSINGS)]
    text = " ".join(sentences)
    words = text.split(" ")
    if len(words) > 4 and r.random() < mix["cut"]:
        text = " ".join(words[:r.randrange(len(words) // 2, len(words))]).rstrip(".?!,")
    return text


# -- splits --------------------------------------------------------------------------------------------------------

@lru_cache(None)
def splits():
    """{split: records {instruction, input, output, dataset}}, the same in every run. No instruction occurs twice.

    output: a demonstration; in the split `eval`, the reference answer that all methods are compared with. dataset: the
    kind of instruction.
    """
    r = random.Random("barn splits")
    instructions = iter(unique(sum(SIZES.values()), lambda: draw_instruction(r)))
    return {split: [record(instruction, r) for instruction in islice(instructions, size)]
            for split, size in SIZES.items()}


def demo(phrasings="both", mix=DEMO, size=500):
    """Records for a second evaluation, which plays the interactions with a public demo, as in the paper.

    By default it is the split `demo`: another mix of kinds, and half of the phrasings are new. phrasings="new",
    mix=EVEN changes the phrasings alone, phrasings="old" the mix alone. No instruction is in another split. It has a
    generator of its own, so that nothing else depends on it: a third of its instructions occur in pretraining, with
    phrasings="old" five sixths.
    """
    r = random.Random("barn demo")
    known = {record["instruction"] for records in splits().values() for record in records}
    return [record(instruction, r) for instruction in unique(
        size, lambda: draw_instruction(r, mix=mix, phrasings=phrasings), known)]


def unique(n, draw, known=()):
    """n different Instructions that draw() makes, none of which has its text among the `known` ones."""
    found, tries = {}, 0
    while len(found) < n:
        instruction = draw()
        if instruction.text not in known:
            found[instruction.text] = instruction
        tries += 1
        if tries > 20 * n:
            raise ValueError(f"only {len(found)} unique instructions in {tries} draws: the grammar is too small")
    return found.values()


def record(instruction, r):
    """An Instruction with a demonstration, as a record of a split."""
    return {"instruction": instruction.text, "input": "", "output": demonstrate(instruction, r),
            "dataset": instruction.kind}


def pretraining_texts(n, seed=0):
    """Yield n texts for pretraining: some are facts about things, most are questions with answers. No instruction of
    any split occurs in them."""
    held_out = {record["instruction"] for records in splits().values() for record in records}
    r = random.Random(f"barn pretraining {seed}")
    things = list(CATEGORY_OF)
    for _ in range(n):
        if r.random() < .12:
            x = r.choice(things)
            yield " ".join(about(x if r.random() < .7 else r.choice(things), r) for _ in range(r.choice([2, 3, 4])))
            continue
        instruction = draw_instruction(r)
        while instruction.text in held_out:
            instruction = draw_instruction(r)
        answer = demonstrate(instruction, r, CLEAN if r.random() < .75 else MIXED)
        yield (f"Q: {instruction.text} A: {answer}" if r.random() < .5 else f"{instruction.text} {answer}")


if __name__ == "__main__":
    for record in splits()["sft"][:25]:
        print(f"{parse(record['instruction'])[0]:>9} | {record['instruction']}  =>  {record['output']}")
