"""From instruction to token ids and back: the tokenizer of a checkpoint folder and the prompt form it goes with.

A checkpoint with a chat template is asked in that form; a base model in AlpacaFarm's (alpaca_farm, prompts v0).
Left out: training new tokenizers (data/barn/pretrain.py), slow tokenizers without a tokenizer.json.
"""
import copy
from pathlib import Path

from tokenizers import Tokenizer

from data import InputError, read_json
from data.template import renderer

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")


def template_of(folder, settings):
    """The chat template of a checkpoint, if it has one: a file (transformers 5), one of the settings, or of several."""
    file = folder / "chat_template.jinja"
    try:
        template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(template, list):                            # several by name, as transformers 4 wrote them
            template = {one["name"]: one["template"] for one in template}.get("default")
        if not template or isinstance(template, str):
            return template
    except (UnicodeDecodeError, LookupError, TypeError):
        pass
    raise InputError(f"{folder}: its chat template is not a text")


class Text:
    """The tokenizer and prompt form of a checkpoint folder; `eos` ends an answer, `stops` are all ids that may."""

    def __init__(self, folder, model=None):
        """`model` is the folder of the model, if it is another one."""
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
        # As in transformers, the older file has the last word, unless the newer one is of the kind that replaced it.
        self.settings = {**older, **settings} if "added_tokens_decoder" in settings else {**settings, **older}
        if isinstance(extra := self.settings.get("extra_special_tokens"), dict):
            self.settings = {**extra, **self.settings}
        self.specials = {name: token for name in self.settings
                         if name.endswith("_token") and (token := self.special(name)) is not None}
        self.bos_token, eos_token = self.specials.get("bos_token"), self.specials.get("eos_token")
        stops = [self.tokenizer.token_to_id(eos_token)] if eos_token else []
        config, generation = (read_json(Path(model or folder) / f"{name}config.json") for name in ("", "generation_"))
        for eos in (config.get("eos_token_id"), generation.get("eos_token_id")):
            stops += eos if isinstance(eos, list) else [eos]
        stops = [stop for stop in stops if stop is not None]
        if not stops:
            raise InputError(f"{folder}: no end-of-text token is named in its config files, so answers could not end")
        vocab = config.get("vocab_size")
        self.vocab = vocab if isinstance(vocab, int) else self.tokenizer.get_vocab_size()
        self.eos, self.stops, self.mark = self.spoken(stops)[0], sorted(set(stops)), ""

    def marked(self, mark):
        """This Text with some words in front of every instruction, which a model may learn to heed."""
        text = copy.copy(self)
        text.mark = mark
        return text

    def spoken(self, ids):
        """These ids, if the model has embeddings for all of them."""
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocab:
                raise InputError(f"{self.folder}: the model has {self.vocab} tokens, and {i!r:.99} is none of them")
        return ids

    def special(self, name):
        token = self.settings.get(name)                           # a string, or {"content": string, ...}, or null
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None          # add_bos_token, say, is true or false

    def encode(self, text):
        if self.template:                                         # the template itself writes the special tokens
            return self.spoken(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return self.plain(text)

    def plain(self, text):
        """Token ids of a text that no template has written, as of one to be continued."""
        ids = self.tokenizer.encode(text).ids
        if self.settings.get("add_bos_token") and self.bos_token:
            bos = self.tokenizer.token_to_id(self.bos_token)
            ids = ids if ids[:1] == [bos] or bos is None else [bos, *ids]
        return self.spoken(ids)

    def chat(self, messages):
        """A conversation in the form of the checkpoint's template, up to where the answer begins."""
        try:
            return renderer(self.template)(messages, **self.specials)
        except InputError as error:
            raise InputError(f"{self.folder}: {error}") from None

    def render(self, instruction, input=""):
        """The prompt as text, up to where the answer begins."""
        instruction = self.mark + instruction
        if self.template:
            content = f"{instruction}\n\n{input}" if input else instruction
            return self.chat([{"role": "user", "content": content}])
        return (ALPACA_INPUT if input else ALPACA).format(instruction=instruction, input=input)

    def prompt(self, record):
        """Token ids of a record's prompt; `record` has an instruction and perhaps an input."""
        return self.encode(self.render(record["instruction"], record.get("input", "")))

    def fitting(self, records, limit):
        """The records whose prompt has at most `limit` tokens; says how many are left out."""
        kept = [record for record in records if len(self.prompt(record)) <= limit]
        if len(kept) < len(records):
            print(f"{len(records) - len(kept)} of {len(records)} prompts are longer than {limit} tokens and left out")
        if not kept:
            raise InputError(f"no prompt has at most {limit} tokens: raise --max_prompt_tokens")
        return kept

    def prompts(self, records, limit):
        """Token ids of the records' prompts that have at most `limit` tokens."""
        return [self.prompt(record) for record in self.fitting(records, limit)]

    def example(self, record, output):
        """(prompt ids, response ids with EOS), tokenised as one text: merges across the seam are the usual ones."""
        text = self.render(record["instruction"], record.get("input", ""))
        prompt, both = self.encode(text), self.encode(text + output)
        if both[:len(prompt)] == prompt:
            response = both[len(prompt):]
        else:                                                     # a merge swallowed the prompt's last token
            response = self.tokenizer.encode(output, add_special_tokens=False).ids
        return prompt, [*response, self.eos]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
