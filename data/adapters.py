"""PEFT folders: LoRA adapters written, read, and merged into the checkpoint that they adapt.

Plain LoRA only: a low-rank product on top of a base that stays as it is. What else PEFT can do is refused by name.
"""
import itertools
import json
import math
import re
from pathlib import Path

import torch

from data.hub import INDEX
from data.weights import (TOKENIZER_FILES, WHOLE, WeightsError, absent, copy_into, load_weights, new_folder, parse_json,
                          raw_bytes, read_header, read_safetensors, refuse, take, write_safetensors, write_whole)

# PEFT options, and the values that make an adapter one number times B @ A on top of an unchanged base model.
PLAIN_LORA = {
    "peft_type": ("LORA",), "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),     # pissa, olora, ... move the base
    **dict.fromkeys(("use_rslora", "fan_in_fan_out"), (True, False, None)),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "monteclora_config", "rank_pattern", "alpha_pattern",
                     "modules_to_save", "target_parameters", "layer_replication", "alora_invocation_tokens"),
                    (None, False, [], {})),
}


def save_adapter(folder, tensors, rank, alpha, target_modules, base, fan_in_fan_out=False, revision=None,
                 tokenizer_from=None):
    """Write LoRA tensors, `<module path>.lora_A` (rank, in) and `<module path>.lora_B` (out, rank), as a folder that
    PEFT loads onto the model `base` at a revision of the hub; fan_in_fan_out if its weights are (in, out), as GPT-2's;
    with the tokenizer of another folder. An adapter folder in its place is replaced as a whole."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(target_modules), "lora_dropout": 0, "bias": "none",
        "fan_in_fan_out": fan_in_fan_out, "inference_mode": True, "use_rslora": False, "modules_to_save": None,
    }
    with new_folder(folder) as temp:
        write_whole(temp / "adapter_config.json", [json.dumps(config, indent=2).encode() + b"\n"])
        if tokenizer_from:
            take(TOKENIZER_FILES, tokenizer_from, temp)
        write_safetensors(temp / "adapter_model.safetensors",
                          {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()})


def load_adapter(folder):
    """(tensors, adapter_config) of a PEFT folder, with the names and shapes that save_adapter takes.
    Plain LoRA only, on any modules: one WeightsError lists every option and every tensor that is something else."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).exists():
            raise absent(folder, name)
    config = parse_json(folder / "adapter_config.json", (folder / "adapter_config.json").read_bytes())
    rank, alpha = config.get("r"), config.get("lora_alpha")
    wrong = [key for key, plain in PLAIN_LORA.items() if config.get(key) not in plain]
    wrong += ["r"] * (type(rank) is not int or rank < 1)
    wrong += ["lora_alpha"] * (type(alpha) not in (int, float) or not math.isfinite(alpha))
    faults = [f"{key} = {config.get(key)!r:.99}" for key in wrong]
    tensors, other = {}, {"A": "B", "B": "A"}
    for key, tensor in read_safetensors(folder / "adapter_model.safetensors")[0].items():
        match = re.fullmatch(r"base_model\.model\.(.+\.lora_([AB]))\.weight", key)
        if match and tensor.dim() == 2 and tensor.shape["AB".index(match[2])] == rank:
            tensors[match[1]] = tensor
        else:
            faults.append(f"{key} {list(tensor.shape)}")
    faults += [f"{name} without its lora_{other[name[-1]]}" for name in tensors
               if name[:-1] + other[name[-1]] not in tensors]
    if faults:
        raise WeightsError(f"{folder}: not a plain LoRA adapter of one rank: {', '.join(faults)}")
    return tensors, config


def lora_scale(config):
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) in rank-stabilised LoRA (Kalajdzievski 2023)."""
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


@torch.no_grad()
def merge(folder, adapter, base):
    """Write the checkpoint `base` with the PEFT folder `adapter` added in: W + scale B A in fp32, rounded once to the
    dtype of W. All else is the base's, byte for byte; in memory is one tensor at a time."""
    folder, base = Path(folder), Path(base)
    if folder.resolve() in (base.resolve(), Path(adapter).resolve()):
        raise WeightsError(f"{folder}: would be replaced by what is merged from it; name another folder")
    if not (base / "config.json").exists():
        raise absent(base, "config.json")
    tensors, config = load_adapter(adapter)
    turned, scale, places = config.get("fan_in_fan_out"), lora_scale(config), load_weights(base).data
    factors, faults = {}, {"missing": [], "wrong": []}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        # Files on the hub may leave out the first name: h.0.attn.c_attn for transformer.h.0.attn.c_attn.
        names = f"{path}.weight", f"{path.partition('.')[2]}.weight"
        name = next((name for name in names if name in places), names[0])
        A, B = (tensors[f"{path}.lora_{ab}"].float() for ab in "AB")
        left, right = factors[name] = (A.T, B.T) if turned else (B, A)
        place, shape = places.get(name), [len(left), right.shape[1]]
        if place is None:
            faults["missing"].append(name)
        elif place.shape != shape or not place.dtype.is_floating_point or place.dtype.itemsize == 1:
            faults["wrong"].append(f"{name} (is {place.dtype} {place.shape}, should be floating point {shape})")
    refuse(f"{base}: these tensors do not fit the adapter {adapter}", faults)

    def merged(name, W):
        if name in factors:
            left, right = factors[name]
            if not copy_into(W, W + scale * left @ right):
                raise WeightsError(f"{base}: {name} is not finite as {W.dtype} once {adapter} is merged into it")
        return W

    with new_folder(folder) as temp:
        take(("config.json", *TOKENIZER_FILES, *([] if (base / WHOLE).exists() else [INDEX])), base, temp)
        take(TOKENIZER_FILES, adapter, temp)
        for path in sorted({place.path for place in places.values()}):
            head, _, held = read_header(path)
            data = (raw_bytes(merged(name, place.tensor())) for name, place in held.items())
            write_whole(temp / path.name, itertools.chain([head], data))
