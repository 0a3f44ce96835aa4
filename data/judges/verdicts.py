"""What a judge's reply means: thoughts are taken off, and a verdict is taken only where it can be read in one way.

A verdict has one of three forms: a short sentence that names one letter and says nothing else ("Output (a)", "The
better one: [[A]]"), alone or with its reason; such a sentence behind the number of a pair, in a list, a line or a
table; or JSON. A reply that names both letters, takes something back, or numbers pairs that were not asked about has no
verdict. So some good replies are lost; but an unusable reply is counted and can be asked for again, while a wrong label
goes unnoticed.
"""
import ast
import itertools
import json
import math
import re
import unicodedata

from data.judges.prompts import template

# ---- thoughts ------------------------------------------------------------------------------------------

TAGS = "(?:think(?:ing)?|reasoning|thought)"
THOUGHT = re.compile(rf"(?P<opens><{TAGS}>|\[THINK\]|<\|channel\|?>(?:analysis|thought))"
                     rf"|</{TAGS}>|\[/THINK\]|<\|channel\|>final<\|message\|>|<channel\|>", re.IGNORECASE)


def content(message):
    """The text of a message, "" for null. Of a list of parts, only the text parts: the others are thoughts."""
    parts = message.get("content")
    if isinstance(parts, list):
        parts = "".join(part["text"] for part in parts if part["type"] in ("text", "output_text"))
    return parts or ""


def without_thought(text):
    """(what a reply says outside of its thoughts, whether it ends within one).

    An end tag without a start tag ends a thought that began in the prompt: everything before it is left out.
    """
    kept, inside, at = "", False, 0
    for tag in THOUGHT.finditer(text):
        if tag["opens"]:
            kept += "" if inside else text[at:tag.start()]
        elif not inside:
            kept = ""
        inside, at = bool(tag["opens"]), tag.end()
    return kept if inside else kept + text[at:], inside


def cut_off(choice, usage=None):
    """Whether a reply ended before its verdict: within a thought, at the token limit, or after reasoning alone."""
    message = choice["message"]
    said, inside = without_thought(content(message))
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    thought = message.get("reasoning_content") or message.get("reasoning") or (
        isinstance(details, dict) and details.get("reasoning_tokens"))
    return inside or choice.get("finish_reason") == "length" or bool(thought) and not said.strip()


# ---- one verdict ---------------------------------------------------------------------------------------

OPEN, CLOSE = r"[(\[{<\"'`*_“‘«「『【]", r"[)\]}>\"'`*_”’»」』】]"
NOUN = "(?:output|option|answer|response|choice|assistant|model)"
# A letter in a sentence that is nothing but a verdict; one without brackets must not be the article "a".
LETTER = re.compile(rf"{OPEN}+\s*([ab])\s*{CLOSE}+|(?<![^\W_])([ab])(?=\W*$|\s*[.,;:|)\]-]|\s+(?:is|wins)\b)",
                    re.IGNORECASE)
WORDS = set("""the better best output option answer response choice one is my i final verdict winner wins prefer
    preferred choose pick result selected would be overall clearly slightly much definitely so therefore boxed text
    ausgabe antwort die der das bessere besser beste ist sortie réponse la le meilleure meilleur est salida respuesta
    el mejor es opción saída resposta melhor é risposta migliore вывод ответ вариант лучше лучший""".split())
OTHER_SCRIPTS = re.compile("[输出答案回选项择更较好佳最优是的为輸選擇項優為力方良いですがの출력답변더나은것이가좋다]+")
# A letter in prose: in brackets, behind a noun, as a capital that is no article, or as "first" or "second".
NAMED = re.compile(rf"{OPEN}\s*([ab])\s*{CLOSE}|\b{NOUN}s?\s+([ab])\b(?!\s+(?-i:[a-z]))|\b((?-i:B))\b"
                   r"|\b((?-i:A))\b(?=\W*$|\s*[^\w\s]|\s+(?:\w+s|did|would|can|only|also|and|or)\b)"
                   rf"|\b(first|second)\s+(?:one|is|{NOUN})\b", re.IGNORECASE)
TAKEN_BACK = re.compile(
    r"(?:^|[.!?;:,\n(–—-]\s*|\bbut\s+)(?:wait|actually|hold on|no|correction|hmm|sorry"
    r"|on reflection|on second thoughts?)\b|\b(?:both|neither|a tie|equally (?:good|bad)|not sure|i mean)\b"
    r"|\b(?:other|second|first)(?: one| output| answer)? (?:is|was) (?:\w+ )?(?:better|best|right)\b", re.IGNORECASE)
NEGATIVE = re.compile(r"\b(?:not|no|never|wrong|worse|worst|incorrect|bad|poor(?:er|est)?|weak(?:er|est)?|inferior"
                      r"|fails?|lacks?|loses?|misse[sd]|rejected|unhelpful|useless|sadly|unfortunately|\w+['’]t)\b",
                      re.IGNORECASE)
REASON = re.compile(r"\n|[.,;:|(–—]|\s-|\s(?:for|(?P<because>because|since|as))\b", re.IGNORECASE)
MAX_HEAD = 300                          # characters within which a verdict has to stand


def sentence(text):
    """The letter of a text that names exactly one, and says nothing else than that it is the better one; or None."""
    if len(text) > MAX_HEAD or "?" in text:
        return None
    letters = {match[match.lastindex].lower() for match in LETTER.finditer(text)}
    rest = re.findall(r"[^\W_]+", LETTER.sub(" ", text).lower())
    known = all(word in WORDS or OTHER_SCRIPTS.fullmatch(word) for word in rest)
    return letters.pop() if len(letters) == 1 and known else None


def named(text):
    """The set of letters, of a and b, that a text names anywhere, in prose, too."""
    found = {match[match.lastindex].lower() for match in NAMED.finditer(text)}
    return {{"first": "a", "second": "b"}.get(name, name) for name in found}


def letter_of(text):
    """The letter of a text that is a verdict, alone or with a reason behind it or in the lines before it; else None.

    The reason must not name the other letter or take the verdict back. Before the verdict, or in its line, it must also
    contain no negative word, which may reverse the verdict ("Output (a): wrong"), except after "because".
    """
    text = text.strip()
    if alone := sentence(text):
        return alone
    for cut in itertools.islice(REASON.finditer(text, 0, MAX_HEAD), 20):
        if letter := sentence(text[:cut.start()]):
            reason = text[cut.start():]
            turned = not cut["because"] and NEGATIVE.search(reason.partition("\n")[0])
            return None if named(reason) - {letter} or turned or TAKEN_BACK.search(reason) else letter
    reason, _, last = text.rpartition("\n")
    letter = sentence(last)
    doubt = named(reason) - {letter} or NEGATIVE.search(reason) or TAKEN_BACK.search(reason)
    return None if doubt else letter


# ---- the verdicts of a reply ---------------------------------------------------------------------------

MARKS = re.compile(r"<\|[^|>\n]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")     # special tokens
ECHO = re.compile(r"<<<[0-9a-f]{8} |[0-9a-f]{8}>>>")                                    # the fences of our prompts
NUMBER = re.compile(r"(?:^|(?<=[\s,;|.]))[\s*_`'\"#>|(\[•-]{0,9}(?:pair\s*)?[#№]?(\d{1,4})"
                    r"(?:[*_`'\"\s]{0,9}[:.)\]|=>→–—-]+[*_`\s]{0,9}|\s+(?=[*_`(\[]|output\b|option\b))", re.IGNORECASE)
PAIR = re.compile(r"(?:pair)?\s*#?(\d{1,4})", re.IGNORECASE)
MAX_REPLY = 100_000                     # characters that are read at all
MAX_LITERAL = 2048                      # characters that ast.literal_eval may parse
MAX_STARTS = 100                        # places where JSON may begin

# Each function returns {pair's number: the set of letters that the reply gives it, with None for an unreadable one}.
# A pair with more than one of these has no verdict.


def letters(reply, number=1):
    """A reply that is one verdict."""
    letter = letter_of(reply) if number == 1 else None
    return {1: {letter}} if letter else {}


def numbered(reply, number=1):
    """Lines such as "3: Output (a)", or several verdicts in one line; the lines between them may give reasons."""
    found, behind, alone = {}, "", set()
    for line in reply.splitlines():
        heads = list(NUMBER.finditer(line))
        if not heads or heads[0].start():
            behind += line + "\n"
            alone |= {sentence(line)} - {None}
            continue
        ends = [head.start() for head in heads[1:]] + [len(line)]
        said = [sentence(line[head.end():end]) for head, end in zip(heads, ends)]
        if not all(said):
            heads, said = heads[:1], [letter_of(line[heads[0].end():])]
        for head, letter in zip(heads, said):
            if letter or named(line) or int(head[1]) == 0:
                found.setdefault(int(head[1]), set()).add(letter)
                behind = ""
    doubt = TAKEN_BACK.search(behind) or number == 1 and (alone | named(behind)) - found.get(1, set())
    return {} if doubt else found


def objects(reply, number=1):
    """A JSON list of {"pair", "better"}, an object that has such a list, or single objects; text around may say why."""
    items, rest = documents(reply)
    items = [{str(key).strip().lower(): value for key, value in item.items()} for item in items]
    items = [item for item in items if "better" in item]
    in_order = len(items) == number and not any("pair" in item for item in items)
    found = {}
    for n, item in enumerate(items, 1):
        match = PAIR.fullmatch(str(n if in_order else item.get("pair")).strip())
        letter = letter_of(item["better"]) if isinstance(item["better"], str) else None
        found.setdefault(int(match[1]) if match else 0, set()).add(letter)
    doubt = TAKEN_BACK.search(rest) or number == 1 and named(rest) - found.get(1, set())
    return {} if doubt else found


def documents(reply):
    """([the JSON objects in a text, in lists or alone], the text behind the last of them)."""
    found, at, decode = [], 0, json.JSONDecoder().raw_decode
    for _ in range(MAX_STARTS):
        start = re.compile(r"[\[{]").search(reply, at)
        if not start:
            break
        at = start.start()
        end = 1 + reply.rfind("]" if reply[at] == "[" else "}")
        try:
            document, at = decode(reply, at)
        except (ValueError, RecursionError):
            try:
                document = ast.literal_eval(reply[at:end]) if end - at <= MAX_LITERAL else None
                at = end
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                at += 1
                continue
        lists = [document] if isinstance(document, list) else [[document]]
        if isinstance(document, dict):
            lists += [value for value in document.values() if isinstance(value, list)]
        found += [item for each in lists for item in each if isinstance(item, dict)]
    return found, reply[at:]


READERS = {"letter": letters, "numbered": numbered, "json": objects}


def read(reply, form, number):
    """{pair's number: letter} of a reply about `number` pairs. form: the form that was asked for; it is tried first,
    then the others, since a judge may use another one."""
    if len(reply) > MAX_REPLY or ECHO.search(reply):
        return {}
    reply = MARKS.sub("\n", unicodedata.normalize("NFKC", reply))
    reply = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", reply)).strip()
    if form == "letter" and len(named(reply)) > 1:
        return {}
    found = next(filter(None, (READERS[name](reply, number) for name in dict.fromkeys([form, *READERS]))), {})
    if not found.keys() <= set(range(1, number + 1)):       # numbers from 0, or of a list of its own
        return {}
    return {n: said.pop() for n, said in found.items() if len(said) == 1 and None not in said}


# ---- replies -> preferences ----------------------------------------------------------------------------

REFUSAL = re.compile(r"\s*(?:i['’]?m sorry|i am sorry|sorry,|i can(?:no|['’])t\b|i(?: a|['’])m unable)", re.IGNORECASE)
BARE = re.compile(r"\W*([ab])\W*", re.IGNORECASE)


def verdicts(annotator, choice, number, cause="", usage=None):
    """What a judge said of `number` pairs, from one of the `choices` of its reply: [(preference or None, cause)].

    A preference is 1 for the text shown first, 2 for the second. It is a fraction if one pair was asked about, the
    reply is a verdict without a reason, and the choice has log-probabilities of its letter. The cause says why there is
    no preference: "refusal", "cut off", "empty", "no verdict"; or the argument `cause`, if there is no choice at all.
    """
    if choice is None:
        return number * [(None, cause)]
    message = choice["message"]
    reply, _ = without_thought(content(message))
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        return number * [(None, "refusal")]
    if cut_off(choice, usage):
        return number * [(None, "cut off")]
    found = read(reply, template(annotator.prompt)["verdict"], number)
    cause = "refusal" if REFUSAL.match(reply) else "no verdict" if reply.strip() else "empty"
    soft = letter_preference(choice, found[1]) if number == 1 and found and sentence(reply) else None
    return [(soft or 1 + "ab".index(found[n]), "") if n in found else (None, cause) for n in range(1, number + 1)]


def letter_preference(choice, letter):
    """2 - P(a) at the token that decides between a and b, from the log-probabilities of a choice; None without them.

    This is the last token that is nothing but the verdict's letter. P(a) adds up all spellings of a (" a", "(A").
    """
    try:
        tokens = [token for token in choice["logprobs"]["content"] if BARE.fullmatch(token["token"])]
        mass = {"a": 0.0, "b": 0.0}
        for top in tokens[-1]["top_logprobs"]:
            match, logprob = BARE.fullmatch(top["token"]), top["logprob"]
            if match and logprob is not None and not math.isnan(logprob):
                mass[match[1].lower()] += math.exp(min(logprob, 0))
        if BARE.fullmatch(tokens[-1]["token"])[1].lower() != letter:
            return None
    except (LookupError, TypeError, AttributeError):        # servers leave out what they do not have
        return None
    return 2 - mass["a"] / sum(mass.values()) if any(mass.values()) else None


def logprob_preference(logprobs, first="m", second="M"):
    """A preference in [1, 2] from {token: log-probability} of a verdict in one token: 2 - P(first) / P(either).

    AlpacaEval 2's logprob_parser; `first` is the token for the answer shown first. A token that is not among the top
    ones counts as impossible; None if neither is there.
    """
    one, two = (math.exp(logprobs.get(token, -math.inf)) for token in (first, second))
    return 2 - one / (one + two) if one + two else None
