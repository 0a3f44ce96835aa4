"""Reward models as others keep them: `...ForSequenceClassification` folders with one label.

Most reward models on the hub are such folders; transformers, TRL and vLLM load them. The tensor score.weight (1, D) is
the head. These libraries read the score at the last token that is not the padding token, so an answer must not end in
the padding token. Such a folder has no bias, but a reward model trained here has one: the constant that gives the
scores the mean 0. It is kept in config.json under BIAS, and read_head() returns it.
"""
import json
import re
from typing import NamedTuple

import torch

from data import families, read_json
from data.files import write_whole
from data.weights import WeightsError, load_weights

CLASS = "ForSequenceClassification"     # how the names of such classes end
BIAS = "score_bias"                     # a key of config.json that only this project reads


class Head(NamedTuple):
    """What makes a decoder a reward model: the score is weight . h + bias, of a final hidden state h. pad: (token, its
    id)."""
    weight: torch.Tensor                # (1, D)
    bias: float
    pad: tuple


def padding(text):
    """(token, its id) with which rows of a Text are padded; a token that ends no answer. It is the tokenizer's padding
    token if possible, else another special token, else the last token of the vocabulary."""
    tokens = text.tokenizer
    special = [i for i, token in tokens.get_added_tokens_decoder().items() if token.special]
    own = tokens.token_to_id(text.specials.get("pad_token", ""))
    for i in (own, *sorted(special, reverse=True), *reversed(range(text.vocab))):
        if i is not None and i < text.vocab and i not in text.stops and tokens.id_to_token(i):
            return tokens.id_to_token(i), i


def classifier_config(config, head):
    """The config.json of a decoder -> that of the reward model made of it."""
    named = config.get("architectures") or []
    if config.get("model_type") == "gemma3_text":       # the class without Text in its name also takes images
        named = ["Gemma3TextModel"]
    named = [re.sub("(ForCausalLM|LMHeadModel|Model)$", "", name) + CLASS for name in named]
    return {**config, "architectures": named, "id2label": {"0": "score"}, "label2id": {"score": 0},
            "pad_token_id": head.pad[1], BIAS: head.bias}


def set_padding(folder, token):
    """Name the token that rows are padded with in the tokenizer's settings in a folder."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name == "tokenizer_config.json" or (folder / name).exists():
            settings = {**read_json(folder / name), "pad_token": token}
            write_whole(folder / name, [json.dumps(settings, indent=2).encode() + b"\n"])


def decoder_names(names, config):
    """{name in a reward model: name in the files of the decoder that it is made of}, without the language model's
    head. Some files, as those of GPT-2, leave out the first part of all names ("transformer.")."""
    ours = families.NAMES.get(config.get("model_type"), families.LLAMA_NAMES)
    prefix, head = f"{ours.get('model', 'model')}.", f"{ours.get('lm_head', 'lm_head')}.weight"
    added = "" if any(name.startswith(prefix) for name in names) else prefix
    return {added + name: name for name in names if name != head}


def is_classifier(folder):
    """Whether config.json says that a checkpoint folder holds a classifier."""
    config = read_json(folder / "config.json")
    named = config.get("architectures")
    return BIAS in config or isinstance(named, list) and any(str(name).endswith(CLASS) for name in named)


def read_head(folder):
    """(weight (1, D), bias) of the head in a folder. WeightsError if there is none or it has several scores."""
    config, tensors = read_json(folder / "config.json"), load_weights(folder)
    if families.SCORE not in tensors:
        raise WeightsError(f"{folder}: no reward model, since it has no tensor {families.SCORE}")
    shape, bias = tensors.data[families.SCORE].shape, config.get(BIAS, 0.)
    if len(shape) != 2 or shape[0] != 1:
        raise WeightsError(f"{folder}: no reward model, which gives one score: its {families.SCORE} is {shape}")
    if type(bias) not in (int, float):
        raise WeightsError(f"{folder}: {BIAS} {bias!r:.99} in config.json is no number")
    return tensors[families.SCORE], bias
