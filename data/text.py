"""From an instruction to token ids and back: the tokenizer and the prompt format of a checkpoint folder.

If the checkpoint has a chat template, prompts are written with it; otherwise in the format of AlpacaFarm (alpaca_farm,
prompts v0). Left out: training tokenizers (see data/barn/pretrain.py), and tokenizers without a tokenizer.json.
"""
import copy
from pathlib import Path

from tokenizers import Tokenizer

from data import InputError, read_json
from data.families import text_config
from data.template import renderer

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")


def template_of(folder, settings):
    """The chat template of a checkpoint folder, or None. It is a file of its own (transformers 5), or one of the
    tokenizer's settings, which may have several by name. InputError if it is not a text."""
    file = folder / "chat_template.jinja"
    try:
        template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(template, list):                            # transformers 4 wrote several, each with a name
            template = {one["name"]: one["template"] for one in template}.get("default")
        if not template or isinstance(template, str):
            return template
    except (UnicodeDecodeError, LookupError, TypeError):
        pass
    raise InputError(f"{folder}: its chat template is not a text")


class Text:
    """The tokenizer and the prompt format of a checkpoint folder.

    eos: the token id that is written behind each answer in training. stops: the sorted ids of all tokens that end an
    answer in sampling. vocab: how many token ids the model has. template: the chat template, or None.
    """

    def __init__(self, folder, model=None):
        """folder: where the tokenizer is. model: where the config.json of the model is, if that is another folder.

        InputError if the folder has no tokenizer.json, a broken one, or none of its files names an end-of-text token.
        """
        folder = self.folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder}: no tokenizer.json (a tokenizer in another form must be converted first)")
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
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
        self.eos, self.stops, self.mark = self.checked(stops)[0], sorted(set(stops)), ""

    def marked(self, mark):
        """A copy of this Text that puts some words in front of every instruction."""
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

    def encode(self, text):
        """Token ids of a prompt that render() or chat() has written."""
        if self.template:                                         # the template itself writes the special tokens
            return self.checked(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return self.plain(text)

    def plain(self, text):
        """Token ids of a text without a template, which the model is to continue; with the BOS token if it has one."""
        ids = self.tokenizer.encode(text).ids
        if self.settings.get("add_bos_token") and self.bos_token:
            bos = self.tokenizer.token_to_id(self.bos_token)
            ids = ids if ids[:1] == [bos] or bos is None else [bos, *ids]
        return self.checked(ids)

    def chat(self, messages, **variables):
        """The text of a conversation [{"role", "content"}] by the chat template, up to where the answer begins.
        variables: more that the template is given. InputError if it fails."""
        try:
            return renderer(self.template)(messages, **{**self.specials, **variables})
        except InputError as error:
            raise InputError(f"{self.folder}: {error}") from None

    def render(self, instruction, input=""):
        """The prompt (text) for an instruction and its input, up to where the answer begins."""
        instruction = self.mark + instruction
        if self.template:
            content = f"{instruction}\n\n{input}" if input else instruction
            return self.chat([{"role": "user", "content": content}])
        return (ALPACA_INPUT if input else ALPACA).format(instruction=instruction, input=input)

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

    def example(self, record, output):
        """(prompt ids, response ids with EOS) for a record and an output (text). Both are tokenised as one text, as the
        first token of the response can depend on the end of the prompt."""
        text = self.render(record["instruction"], record.get("input", ""))
        prompt, both = self.encode(text), self.encode(text + output)
        if both[:len(prompt)] == prompt:
            response = both[len(prompt):]
        else:                                                     # one token spans the end of the prompt
            response = self.tokenizer.encode(output, add_special_tokens=False).ids
        return prompt, [*response, self.eos]

    def decode(self, ids):
        """The text of an answer's token ids, without special tokens and without whitespace around it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
