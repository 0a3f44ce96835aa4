"""Turns the tokens of an answer into text and into the `choices` of OpenAI's replies, for serve.py.

Source: OpenAI's API reference, chat completions and completions (platform.openai.com/docs/api-reference).
"""
import re
from functools import cache
from itertools import accumulate

from tokenizers.decoders import ByteLevel

from data.text import CLOSE, OPEN, parted

PART = "\ufffd"                         # the decoder's output for a character of which only some bytes are there yet


class Answer:
    """One answer of a request: its tokens, its text, and how much of the text the client has got.

    The text may end in a part of a character, in a part of a stop string, or, in a chat, in a part of a thought's tag
    or in whitespace that may turn out to be the end of the answer. Such an end is held back until more tokens arrive.
    `thought` and `content` are the texts that were sent. `offset` is where the next token begins in the text, for the
    log-probs of completions: a character of several tokens begins at the first of them. `opened`: whether the prompt
    ends with <think>.
    """

    def __init__(self, request, index, prompt, u, model, prompt_text=""):
        self.request, self.index, self.text, self.spell = request, index, model.text, model.spell
        self.prompt, self.u, self.scores = prompt, u, []            # as rlhf/writer.py needs them
        self.told, self.dropped, self.finish, self.count = 0, False, None, 0
        # A completion is decoded together with the end of its prompt, as some tokenizers drop the space before the
        # first word of a text. `before` and `begin` are how many characters and tokens belong to the prompt.
        self.ids = [] if request.chat else prompt[-8:]
        self.before, self.begin = 0, len(self.ids)
        self.before = len(self.decode(self.begin).rstrip(PART))
        self.echo = prompt_text if request.echo else ""             # what the client gets of the prompt
        self.opened = request.chat and prompt_text.rstrip().endswith(OPEN)
        self.thought, self.content, self.entries, self.offset = "", "", [], 0

    def decode(self, end):
        """The text of the answer after its first tokens: of ids[:end], without the part that belongs to the prompt."""
        if self.request.chat:
            return self.text.words(self.ids[:end])
        return self.text.tokenizer.decode(self.ids[:end], skip_special_tokens=True)[self.before:]

    def take(self, ids, logps, ended):
        """Add new tokens to the answer; returns (new thought and new text for the client, new log-prob entries).

        ids: the new token ids. logps: for each of them its log-prob and the best alternatives, as in entry().
        ended: whether the writer has finished this answer.
        """
        eos, stops = bool(ended and ids and ids[-1] in self.text.stops), self.request.stops
        old = len(self.ids)
        self.ids += ids[:-1] if eos else ids
        raw = self.decode(len(self.ids))
        if any(stop in raw for stop in stops):          # drop all tokens behind the one that completed a stop string
            end = next(i for i in range(old + 1, len(self.ids) + 1) if any(stop in self.decode(i) for stop in stops))
            del self.ids[end:]
            raw = self.decode(end)
            raw = raw[:min(raw.find(stop) for stop in stops if stop in raw)]
            self.finish, self.dropped, eos = "stop", True, False
        elif ended:
            self.finish = "stop" if eos else "length"
        self.count = len(self.ids) - self.begin + eos
        # After an echoed prompt, lm-eval expects an entry for every token, including the end-of-text token.
        spelled = [*self.ids[old:], *(ids[-1:] if eos and self.request.echo else [])]
        entries = [*self.echoed(), *(self.entry(id, logp) for id, logp in zip(spelled, logps))]
        self.entries += entries
        return *self.unsent(raw), entries

    def echoed(self):
        """The entries of the prompt's tokens, if they are wanted and have not been sent yet."""
        scored, self.scores = zip(self.prompt, self.scores), []
        entries = [self.entry(id, logp) for id, logp in scored]
        if entries:                                     # counted back from the end of the prompt's text
            self.offset = len(self.echo) - sum(map(characters, entries))
        return entries

    def unsent(self, raw):
        """(thought, text): the parts of the text `raw` that have not been sent yet and that later tokens cannot change.
        """
        end = len(raw)
        if not self.finish:
            end = len(raw.rstrip(PART))
            held = [*self.request.stops, *(OPEN, CLOSE) * self.request.chat]
            # the end of the text may be the first k characters of one: of "</think>", say, if the text ends in "</th"
            begun = [k for each in held for k in range(1, len(each)) if raw.endswith(each[:k], 0, end)]
            end -= max(begun, default=0)
        thought, text = parted(raw[:end], self.opened) if self.request.chat else ("", self.echo + raw[:end])
        new = thought[len(self.thought):], text[len(self.content):]
        self.thought, self.content = thought, text
        return new

    def entry(self, id, logps):
        """A token's log-prob and its alternatives in OpenAI's form.

        logps: (its log-prob, ids of the likeliest tokens, their log-probs), as ServingEngine.read() gives them; None
        for the first token of a prompt, which nothing predicts.
        """
        logp, *best = logps or (None, (), ())
        tokens = [(id, logp), *zip(*best)][:1 + self.request.top]
        entries = []
        for id, logp in tokens:
            data = self.spell(id)
            entries.append({"token": data.decode(errors="backslashreplace"), "bytes": list(data),
                            "logprob": None if logp is None else max(logp, -9999.)})
        return {**entries[0], "top_logprobs": None if logps is None else entries[1:]}

    def choice(self, kind, thought, text, entries, finish, **role):
        """An entry of `choices` in OpenAI's form. kind: "message" for a whole answer, "delta" for a piece of a stream.
        role: role="assistant", for chats where OpenAI sends it. A thought is named as vLLM does."""
        if self.request.chat:
            thought = {"reasoning_content": thought} if thought else {}
            said, logprobs = {kind: {**role, **thought, "content": text}}, {"content": entries, "refusal": None}
        else:
            said, logprobs = {"text": text}, self.completion_logprobs(entries)
        return {"index": self.index, **said, "logprobs": logprobs if self.request.logprobs else None,
                "finish_reason": finish}

    def completion_logprobs(self, entries):
        """The log-probs of a completion, in lists: its tokens, where each begins in the text, the log-probs, and for
        each a dict of the likeliest tokens and itself. The places in a prompt are counted back from its end: if the
        tokenizer has added a space somewhere, all places before that are too low by one."""
        ends = [*accumulate(map(characters, entries), initial=self.offset)]
        self.offset = ends.pop()
        return {"tokens": [each["token"] for each in entries], "text_offset": [max(0, end) for end in ends],
                "token_logprobs": [each["logprob"] for each in entries],
                "top_logprobs": [likeliest(each) for each in entries]}


def likeliest(entry):
    """{token: its log-prob} of an entry and its alternatives. Of tokens with the same text the likeliest counts."""
    if entry["top_logprobs"] is None:
        return None
    return {one["token"]: one["logprob"] for one in (entry, *reversed(entry["top_logprobs"]))}


def characters(entry):
    """How many characters begin in a token: its bytes without UTF-8's continuation bytes, 10xxxxxx."""
    return sum(byte & 0xC0 != 0x80 for byte in entry["bytes"])


def speller(tokenizer):
    """A function that returns the bytes of a token id. Text.decode() cannot do it for parts of characters.

    Tokenizers write bytes in one of two ways: GPT-2's alphabet, which has a printable character for each byte, or, for
    single bytes, <0xE2> as SentencePiece does.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]       # bytes whose character is printable as it is
    printed = {chr(byte): byte for byte in plain}
    printed |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*plain}))}

    @cache
    def spell(id):
        piece = tokenizer.id_to_token(id) or ""
        if isinstance(tokenizer.decoder, ByteLevel) and printed.keys() >= set(piece):
            return bytes(printed[character] for character in piece)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()                    # SentencePiece's space
    return spell
