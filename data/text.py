"""From an instruction to token ids and back: the tokenizer and the prompt format of a checkpoint folder.

If the checkpoint has a chat template, prompts are written with it; otherwise in the format of AlpacaFarm (alpaca_farm,
prompts v0). The words of the template may be special tokens. What a user or a data set says never becomes one:
<|im_end|> in an instruction is a text like any other, and cannot end a turn.
Left out: training tokenizers (see data/barn/pretrain.py), and tokenizers without a tokenizer.json.
"""
import bisect
import copy
import json
import re
from datetime import date, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from data import InputError, read_json
from data.families import text_config
from data.progress import say_once
from data.template import ASSISTANT, USER, Prompt, contents_of, renderer

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
OPEN, CLOSE = "<think>", "</think>"     # around the thought of a model that thinks before it answers
NO_THOUGHT = "\n</think>\n\n"           # ends a thought that the template has opened
UNKNOWN = "\ue000 a"                    # a text with a character that no vocabulary has
CUT = " ... "                           # where the middle of a text was cut out
TODAY = str(date.today())               # stays the same while the process runs


class Turn(NamedTuple):
    """How a chat template writes an answer."""
    before: str = ""                    # what the template writes between prompt and answer, such as an empty thought
    end: int | None = None              # the token behind the answer; None if the template writes none
    opened: bool = False                # whether the prompt ends with <think>


def template_of(folder, settings):
    """The chat template of a checkpoint folder, or None. It is a file of its own (transformers 5) or one of the
    tokenizer's settings. InputError if it is not a text."""
    file = folder / "chat_template.jinja"
    try:
        template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(template, list):                            # transformers 4 could write several, with names
            template = {one["name"]: one["template"] for one in template}.get("default")
        if not template or isinstance(template, str):
            return template
    except (UnicodeDecodeError, LookupError, TypeError):
        pass
    raise InputError(f"{folder}: its chat template is not a text")


class Text:
    """The tokenizer and the prompt format of a checkpoint folder.

    vocab: how many token ids the model has. template: the chat template, or None.
    """

    def __init__(self, folder, model=None, day="", variables=None):
        """folder: where the tokenizer is. model: where the config.json of the model is, if that is another folder.
        day: the date, as in 2026-11-30, that the template gets if it asks for today's. variables: more variables for
        the template.

        InputError if the folder has no tokenizer.json or a broken one, or if no file names an end-of-text token.
        """
        folder = self.folder = Path(folder)
        self.day, self.variables = datetime.fromisoformat(day or TODAY), variables or {}
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder}: no tokenizer.json (a tokenizer in another form must be converted first)")
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.tokenizer.encode(UNKNOWN)                        # some fail where a text has what they do not know
        except Exception as error:                                # the library raises bare Exceptions
            raise InputError(f"{folder}/tokenizer.json: {error}") from None
        self.tokenizer.no_padding(), self.tokenizer.no_truncation()
        settings, older = (read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
        self.template = template_of(folder, settings)
        settings = {name: value for name, value in settings.items() if value is not None}
        # As in transformers: special_tokens_map.json, the older file, overrides tokenizer_config.json, unless the
        # latter has the key added_tokens_decoder, which made the older file superfluous.
        self.settings = {**older, **settings} if "added_tokens_decoder" in settings else {**settings, **older}
        if isinstance(extra := self.settings.get("extra_special_tokens"), dict):
            self.settings = {**extra, **self.settings}
        tokens = {name: self.special(name) for name in self.settings if name.endswith("_token")}
        self.specials = {name: token for name, token in tokens.items() if token is not None}
        self.bos_token, eos_token = self.specials.get("bos_token"), self.specials.get("eos_token")
        stops = [self.tokenizer.token_to_id(eos_token)] if eos_token else []
        config, generation = (read_json(Path(model or folder) / f"{name}config.json") for name in ("", "generation_"))
        config = text_config(config)
        for eos in (config.get("eos_token_id"), generation.get("eos_token_id")):
            stops += eos if isinstance(eos, list) else [eos]
        stops = [stop for stop in stops if stop is not None]
        if not stops:
            raise InputError(f"{folder}: no end-of-text token is named in its config files, so answers could not end")
        vocab = config.get("vocab_size")
        self.vocab = vocab if isinstance(vocab, int) else self.tokenizer.get_vocab_size()
        self.named_stops, self.mark = self.checked(stops), ""

    def marked(self, mark):
        """A copy of this Text that puts `mark` in front of every instruction."""
        text = copy.copy(self)
        text.mark = mark
        return text

    def checked(self, ids):
        """Returns the ids; InputError if the model has no embedding for one of them."""
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocab:
                raise InputError(f"{self.folder}: the model has {self.vocab} tokens, but its tokenizer or config.json "
                                 f"uses the token id {i!r:.99}")
        return ids

    def special(self, name):
        """The special token (string) under a name like bos_token in the settings, or None."""
        token = self.settings.get(name)                           # a string, or {"content": string, ...}, or null
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None          # add_bos_token is true or false

    def encode(self, prompt):
        """Token ids of a Prompt. In any other string, whatever looks like a special token becomes one."""
        contents = [prompt[start:end] for start, end in getattr(prompt, "contents", [])]
        if any(self.control.search(content) for content in contents):
            ids = self.with_literal_contents(prompt)
        else:                                                     # a template itself writes the special tokens
            ids = self.tokenizer.encode(prompt, add_special_tokens=not self.template).ids
        return self.checked(ids if self.template else self.with_bos(ids))

    def with_literal_contents(self, prompt):
        """Token ids of a Prompt whose contents hold something that looks like a control token.

        The control tokens outside of the contents, which the template wrote, become their ids. All text between them,
        contents included, is encoded literally.
        """
        found = self.tokenizer.encode(prompt, add_special_tokens=not self.template)
        ids, at = [], 0                                           # prompt[:at] has been encoded
        for id, (start, end) in zip(found.ids, found.offsets):
            token = prompt[start:end].strip()           # some tokens take the whitespace around them
            begin = prompt.find(token, start)
            inside = any(first <= begin and begin + len(token) <= last for first, last in prompt.contents)
            if id in self.control_tokens.values() and not inside:
                ids += [*self.literally(prompt[at:start]), id]
                at = max(at, end)
        return ids + self.literally(prompt[at:])

    def literally(self, text):
        """Token ids of a text in which nothing counts as a control token."""
        return self.literal.encode(text, add_special_tokens=False).ids if text else []

    @cached_property
    def control_tokens(self):
        """{token: id} of the tokens that steer a chat: all special tokens, and the other added tokens that the template
        writes in a turn, except those around a thought."""
        tokens = self.tokenizer.get_added_tokens_decoder()
        turns = self.turns if self.template else ""
        return {token.content: id for id, token in tokens.items() if token.content not in (OPEN, CLOSE)
                and (token.special or token.content.strip() and token.content in turns)}

    @cached_property
    def control(self):
        """A pattern that finds control tokens in a text."""
        return re.compile("|".join(map(re.escape, self.control_tokens)) or "(?!)")

    @cached_property
    def literal(self):
        """A tokenizer that encodes control tokens as if they were ordinary text."""
        document = json.loads(self.tokenizer.to_str())
        for token in document["added_tokens"]:
            token["special"] = token["content"] in self.control_tokens
        tokenizer = Tokenizer.from_str(json.dumps(document))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def plain(self, text):
        """Token ids of a text that the model is to continue: no template, BOS if the tokenizer adds it."""
        return self.checked(self.with_bos(self.tokenizer.encode(text).ids))

    def with_bos(self, ids):
        """The ids with one BOS token in front if tokenizer_config.json asks for it. There are never two, even if the
        text itself begins with one."""
        bos = self.tokenizer.token_to_id(self.bos_token) if self.bos_token else None
        if bos is None:
            return ids
        if ids[:2] == [bos, bos]:
            return ids[1:]
        return [bos, *ids] if self.settings.get("add_bos_token") and ids[:1] != [bos] else ids

    def chat(self, messages, /, **variables):
        """The Prompt that the chat template writes for a conversation [{"role", "content"}], up to where the answer
        begins. variables: more variables for the template. InputError if the template fails."""
        prompt = Prompt(self.rendered(messages, **variables))
        said = "\n".join(str(message.get("content")) for message in messages)
        if found := self.control.search(said):
            prompt.contents = contents_of(prompt, messages, partial(self.rendered, **variables))
            if prompt.contents is None:
                raise InputError(f"{self.folder}: the chat template rewrites a message, so that its own {found[0]} "
                                 "cannot be told from the one in the message")
        return prompt

    def rendered(self, messages, /, **variables):
        """What the template writes for a chat."""
        variables = {**self.variables, **variables}
        if "messages" in variables:
            raise InputError("'messages' is no variable of a chat template: it is the chat")
        try:
            return renderer(self.template)(messages, **{**self.specials, "strftime_now": self.today, **variables})
        except InputError as error:
            raise InputError(f"{self.folder}: {error}") from None

    def today(self, form):
        """The day of the run, in the form that a template asks for."""
        return self.day.strftime(form)

    @cached_property
    def turns(self):
        """What the template writes for a question and its answer; "" if it refuses such a chat."""
        try:
            return self.rendered([USER, ASSISTANT], add_generation_prompt=False)
        except InputError:
            return ""

    @cached_property
    def turn(self):
        """The Turn of the chat template, found by rendering a question without and with its answer.

        `asked` is the prompt, and self.turns is asked + before + answer + end token + more. For Qwen3, `before` is an
        empty thought, from <think> to </think>, and `end` is the id of <|im_end|>.
        """
        try:
            asked = self.rendered([USER]) if self.template else ""
        except InputError:
            asked = ""
        opened, answer = asked.rstrip().endswith(OPEN), ASSISTANT["content"]
        before, end, at = "", None, self.turns.rfind(answer)
        if at >= 0:
            behind = self.tokenizer.encode(self.turns[at + len(answer):].lstrip(), add_special_tokens=False).ids
            end = next((id for id in behind[:1] if id in self.tokenizer.get_added_tokens_decoder()), None)
            before = self.turns[len(asked):at] if self.turns.startswith(asked) else ""
        if opened and CLOSE not in before:
            before = NO_THOUGHT
        return Turn(before, end, opened)

    @property
    def eos(self):
        """The token id that ends each answer in training."""
        return self.named_stops[0] if not self.template or self.turn.end is None else self.turn.end

    @property
    def stops(self):
        """The sorted ids of all tokens that end an answer in sampling."""
        return sorted({*self.named_stops, self.eos})

    @property
    def thinks(self):
        """Whether the template expects a thought before an answer."""
        return bool(self.template) and (self.turn.opened or OPEN in self.turn.before)

    def render(self, instruction, input=""):
        """The Prompt for an instruction and its input, up to where the answer begins."""
        instruction = self.mark + instruction
        if self.template:
            content = f"{instruction}\n\n{input}" if input else instruction
            return self.chat([{"role": "user", "content": content}])
        return filled(ALPACA_INPUT if input else ALPACA, instruction=instruction, input=input)

    def prompt(self, record):
        """Token ids of the prompt for a record {"instruction": text, "input": text or absent}."""
        return self.encode(self.render(record["instruction"], record.get("input", "")))

    def fitting(self, records, limit):
        """The records whose prompts have at most `limit` tokens. Prints how many are left out. InputError if all are.
        """
        kept = [record for record in records if len(self.prompt(record)) <= limit]
        if len(kept) < len(records):
            print(f"{len(records) - len(kept)} of {len(records)} prompts are longer than {limit} tokens and left out")
        if not kept:
            raise InputError(f"no prompt has at most {limit} tokens: raise --max_prompt_tokens")
        return kept

    def prompts(self, records, limit):
        """Token ids of the records' prompts, without the prompts of more than `limit` tokens."""
        return [self.prompt(record) for record in self.fitting(records, limit)]

    def shortened(self, records, limit):
        """Token ids of the records' prompts, each of at most `limit` tokens. Prints how many had to be cut."""
        prompts = [self.prompt(record) for record in records]
        long = [i for i, prompt in enumerate(prompts) if len(prompt) > limit]
        for i in long:
            prompts[i] = self.cut(records[i], limit)
        if long:
            say_once(f"{len(long)} of {len(records)} prompts are longer than {limit} tokens: cut in the middle")
        return prompts

    def cut(self, record, limit):
        """Token ids of the prompt for a record, cut to at most `limit` tokens: CUT replaces the middle of the longer
        text (instruction or input). The template and both ends of the text stay. InputError if the template alone does
        not fit."""
        name = max(("input", "instruction"), key=lambda name: len(record.get(name, "")))
        text = record[name]
        if len(text) <= len(CUT):
            raise InputError(f"a prompt without its text is longer than {limit} tokens: lower --max_new_tokens")

        def with_characters(n):                                   # with 5: the first 3 and the last 2
            return self.prompt({**record, name: text[:n - n // 2] + CUT + text[len(text) - n // 2:]})
        n = bisect.bisect_right(range(len(text)), limit, key=lambda n: len(with_characters(n))) - 1
        while n >= 0 and len(with_characters(n)) > limit:         # a longer text may have fewer tokens
            n -= 1
        return with_characters(n) if n >= 0 else self.cut({**record, name: CUT}, limit)         # cut the other text

    def example(self, record, output):
        """(prompt ids, response ids with EOS) for a record and an output (text). Both are tokenised as one text, as the
        first token of the response can depend on the end of the prompt.

        An output without a thought is given the empty one that the template writes.
        """
        asked, before = self.render(record["instruction"], record.get("input", "")), ""
        if self.template and not output.lstrip().startswith(OPEN):
            before = self.turn.before
        elif self.template and self.turn.opened:
            output = output.lstrip().removeprefix(OPEN).lstrip("\n")
        prompt, both = self.encode(asked), self.encode(asked.then(before, output))
        if both[:len(prompt)] == prompt:
            response = both[len(prompt):]
        else:                                                     # one token spans the end of the prompt
            response = self.tokenizer.encode(before, add_special_tokens=False).ids + self.literally(output)
        return prompt, [*response, self.eos]

    @cached_property
    def unseen(self):
        """The ids of the tokens that words() leaves out: all special tokens except those around a thought."""
        tokens = self.tokenizer.get_added_tokens_decoder()
        return {id for id, token in tokens.items() if token.special and token.content not in (OPEN, CLOSE)}

    def words(self, ids):
        """The text of token ids, without special tokens other than those around a thought."""
        return self.tokenizer.decode([id for id in ids if id not in self.unseen], skip_special_tokens=False)

    def decode(self, ids):
        """The text of an answer's token ids, without its thought, special tokens, and whitespace around it."""
        return parted(self.words(ids), self.template and self.turn.opened)[1]


def parted(text, opened):
    """Split what a model wrote into (thought, answer), without whitespace around them. The answer is "" if the thought
    has no end. opened: whether the thought began in the prompt."""
    text = text.strip()
    if not opened and not text.startswith(OPEN):
        return "", text
    thought, _, answer = text.removeprefix(OPEN).partition(CLOSE)
    return thought.strip(), answer.strip()


def filled(form, **contents):
    """The Prompt that a form becomes when its {places} are filled with contents."""
    prompt, (*pieces, end) = Prompt(), re.split(r"\{(\w+)\}", form)
    for words, place in zip(pieces[::2], pieces[1::2]):
        prompt = prompt.then(words, contents[place])
    return prompt.then(end, "")
