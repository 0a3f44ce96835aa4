"""From instruction to token ids and back: the tokenizer of a checkpoint folder and the prompt form it goes with.

A checkpoint with a chat template is asked in that form; a base model in AlpacaFarm's (alpaca_farm, prompts v0).
Left out: training new tokenizers (data/barn/pretrain.py), slow tokenizers without a tokenizer.json.
"""
import json
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from data import InputError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:")
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")


def read_json(path):
    """The JSON object in a file, {} if there is no such file; InputError if it is not one."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object")
    return document


@lru_cache(None)
def chat_template(template):
    """The renderer of a chat template, sandboxed as in transformers: it comes with a download, not to be trusted."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment      # jinja2 is a hard requirement of torch
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render


class Text:
    """The tokenizer and prompt form of a checkpoint folder; `eos` ends an answer, `stops` are all ids that may."""

    def __init__(self, folder):
        folder = self.folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder}: no tokenizer.json (a tokenizer in another form must be converted first)")
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:                                # the library raises bare Exceptions
            raise InputError(f"{folder}/tokenizer.json: {error}") from None
        self.tokenizer.no_padding(), self.tokenizer.no_truncation()
        self.settings = read_json(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"                 # where transformers 5 puts it; the file wins
        self.template = template.read_text() if template.is_file() else self.settings.get("chat_template")
        if isinstance(self.template, list):                       # several by name, as transformers 4 wrote them
            self.template = {one.get("name"): one.get("template") for one in self.template}.get("default")
        self.bos_token, eos_token = (self.special(name) for name in ("bos_token", "eos_token"))
        stops = [self.tokenizer.token_to_id(eos_token)] if eos_token else []
        for name in ("config.json", "generation_config.json"):
            eos = read_json(folder / name).get("eos_token_id")
            stops += eos if isinstance(eos, list) else [eos]
        stops = [stop for stop in stops if stop is not None]
        if not stops:
            raise InputError(f"{folder}: no end-of-text token is named in its config files, so answers could not end")
        self.eos, self.stops = stops[0], sorted(set(stops))

    def special(self, name):
        token = self.settings.get(name)                           # a string, or {"content": string, ...}
        return token["content"] if isinstance(token, dict) else token

    def encode(self, text):
        if self.template:                                         # the template itself writes the special tokens
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        ids = self.tokenizer.encode(text).ids
        if self.settings.get("add_bos_token") and ids[:1] != [self.tokenizer.token_to_id(self.bos_token)]:
            ids = [self.tokenizer.token_to_id(self.bos_token), *ids]
        return ids

    def render(self, instruction, input=""):
        """The prompt as text, up to where the answer begins."""
        if self.template:
            content = f"{instruction}\n\n{input}" if input else instruction
            try:
                return chat_template(self.template)(
                    messages=[{"role": "user", "content": content}], add_generation_prompt=True,
                    bos_token=self.bos_token or "", eos_token=self.special("eos_token") or "")
            except Exception as error:                            # a template is a program: it can fail in any way
                raise InputError(f"{self.folder}: its chat template fails: {error}") from None
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
