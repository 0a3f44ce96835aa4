"""PEFT folders: writes and reads LoRA adapters, and merges them into the checkpoint that they were trained on.

Plain LoRA only: W + scale B A for some weights W of a base model that stays unchanged. An adapter folder that uses
other options of PEFT (DoRA, modules_to_save, ...) is refused, and the error names the options.
"""
import json
import math
import re
from pathlib import Path

import torch

from data import classifiers, families, read_json
from data.files import write_whole
from data.hub import INDEX
from data.weights import (TOKENIZER_FILES, WHOLE, WeightsError, absent, copy_files, copy_into, load_weights,
                          new_folder, parse_json, read_header, read_safetensors, refuse, write_each, write_index,
                          write_safetensors)

# {option of PEFT: the values with which an adapter is plain LoRA}
PLAIN_LORA = {
    "peft_type": ("LORA",), "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),     # pissa, olora, ... change the base
    **dict.fromkeys(("use_rslora", "fan_in_fan_out"), (True, False, None)),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "monteclora_config", "rank_pattern", "alpha_pattern",
                     "modules_to_save", "target_parameters", "layer_replication", "alora_invocation_tokens"),
                    (None, False, [], {})),
}


def save_adapter(folder, tensors, rank, alpha, target_modules, base, fan_in_fan_out=False, revision=None,
                 tokenizer_from=None):
    """Write a LoRA adapter as a folder that PEFT loads. An adapter folder of this name is replaced as a whole.

    tensors: {name: tensor}, with names `<module path>.lora_A` (rank, in) and `<module path>.lora_B` (out, rank).
    target_modules: a list of names, or a pattern. base, revision: the model that the adapter belongs to, a name on the
    hub or a folder. fan_in_fan_out: the weights of the base are (in, out), as in GPT-2. tokenizer_from: a folder whose
    tokenizer is copied.
    """
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0, "bias": "none",
        "target_modules": target_modules if isinstance(target_modules, str) else sorted(target_modules),
        "fan_in_fan_out": fan_in_fan_out, "inference_mode": True, "use_rslora": False, "modules_to_save": None,
    }
    with new_folder(folder) as temp:
        write_whole(temp / "adapter_config.json", [json.dumps(config, indent=2).encode() + b"\n"])
        if tokenizer_from:
            copy_files(TOKENIZER_FILES, tokenizer_from, temp)
        write_safetensors(temp / "adapter_model.safetensors",
                          {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()})


def load_adapter(folder):
    """(tensors, adapter_config) of a PEFT folder; names and shapes of the tensors are those of save_adapter().

    If the adapter is not plain LoRA, one WeightsError lists all options and tensors that do not fit.
    """
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
            # Before transformers 4.52 models that also see images named their parts so.
            tensors[re.sub(r"^language_model\.model\.", "model.language_model.", match[1])] = tensor
        else:
            faults.append(f"{key} {list(tensor.shape)}")
    faults += [f"{name} without its lora_{other[name[-1]]}" for name in tensors
               if name[:-1] + other[name[-1]] not in tensors]
    if faults:
        raise WeightsError(f"{folder}: not a plain LoRA adapter of one rank: {', '.join(faults)}")
    return tensors, config


def lora_scale(config):
    """The factor of B A: alpha / r, or alpha / sqrt(r) in rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732)."""
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


class Merged:
    """The tensors of a checkpoint with an adapter merged into it, each computed when it is asked for.

    W + scale B A is computed in fp32 and rounded once, to `dtype`, or without one to the dtype of W. What is not merged
    and has its dtype already is as in the base, byte for byte.
    """

    def __init__(self, base, adapter, dtype):
        """base: a checkpoint folder. WeightsError if the PEFT folder `adapter` does not fit it."""
        self.base, self.adapter, self.dtype = base, adapter, dtype
        self.places = load_weights(base).data
        self.factors = factors(adapter, base, self.places) if adapter else {}
        self.lost = self.whole = 0.                     # sums of squares over the updates so far

    def dtype_of(self, name):
        own = self.places[name].dtype
        return self.dtype if self.dtype and own.is_floating_point else own

    def tensor(self, name):
        """WeightsError if a value is not finite in its new dtype."""
        W, dtype = self.places[name].tensor(), self.dtype_of(name)
        if name not in self.factors:
            return W if W.dtype == dtype else self.rounded(name, W, dtype)
        left, right = self.factors[name]
        update = left @ right
        out = self.rounded(name, W + update, dtype)
        arrived = out.float() - W.to(dtype).float()
        self.lost += (update - arrived).square().sum().item()
        self.whole += update.square().sum().item()
        return out

    def rounded(self, name, values, dtype):
        out = torch.empty(values.shape, dtype=dtype)
        if not copy_into(out, values):
            cause = f" once {self.adapter} is merged into it" if name in self.factors else ""
            raise WeightsError(f"{self.base}: {name} is not finite as {dtype}{cause}")
        return out

    @property
    def share_lost(self):
        """The share of the update that rounding has lost: |D - (round(W + D) - round(W))| / |D|, where D = scale B A
        and |.| is over all merged weights. In bf16 neighbouring numbers differ by 1/256 to 1/128 of their size, and
        an update that is small beside that is lost."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.


def factors(adapter, base, places):
    """{name of a weight of the base: the two fp32 matrices whose product the PEFT folder `adapter` adds to it}.

    places: {name: Place} of the base. One WeightsError lists all that does not fit.
    """
    tensors, config = load_adapter(adapter)
    transposed, scale = config.get("fan_in_fan_out"), lora_scale(config)
    found, faults = {}, {"missing": [], "wrong": []}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        # Some files on the hub leave out the first part of a name: h.0.attn.c_attn for transformer.h.0.attn.c_attn.
        # Those of models that also see images have language_model.model for model.language_model.
        swapped = path.replace("model.language_model.", "language_model.model.", 1)
        names = [f"{name}.weight" for name in (path, path.partition(".")[2], swapped)]
        name = next((name for name in names if name in places), names[0])
        A, B = (tensors[f"{path}.lora_{ab}"].float() for ab in "AB")
        left, right = (A.T, B.T) if transposed else (B, A)
        found[name] = scale * left, right
        place, shape = places.get(name), [len(left), right.shape[1]]
        if place is None:
            faults["missing"].append(name)
        elif place.shape != shape or not place.dtype.is_floating_point or place.dtype.itemsize == 1:
            faults["wrong"].append(f"{name} (is {place.dtype} {place.shape}, should be floating point {shape})")
    refuse(f"{base}: these tensors do not fit the adapter {adapter}", faults)
    return found


@torch.no_grad()
def merge(folder, adapter, base, dtype=None, head=None):
    """Merge the PEFT folder `adapter` into the checkpoint folder `base`, and write the result to `folder`. Returns the
    share of the update that rounding lost, as in Merged.

    dtype: of what is written (default: as in the base). head: a classifiers.Head, with which the result is a reward
    model; then `adapter` may be None. The result is split into files as the base is, and one tensor of the base is in
    memory at a time. WeightsError if base and adapter do not fit each other, or a tensor is not finite in its dtype.
    """
    folder, base = Path(folder), Path(base)
    if folder.resolve() in [path.resolve() for path in (base, Path(adapter or base))]:
        raise WeightsError(f"{folder}: would be replaced by the model that is merged from it; name another folder")
    if not (base / "config.json").exists():
        raise absent(base, "config.json")
    merged, config = Merged(base, adapter, dtype), read_json(base / "config.json")
    olds = classifiers.decoder_names(merged.places, config) if head else {name: name for name in merged.places}
    files = {}                                          # {file of the base: {name: (dtype, shape)}}
    for name, old in olds.items():
        place = merged.places[old]
        files.setdefault(place.path, {})[name] = merged.dtype_of(old), place.shape
    if head:
        files[max(files)][families.SCORE] = dtype or torch.float32, list(head.weight.shape)

    def tensor(name):
        return head.weight.to(dtype or torch.float32) if name not in olds else merged.tensor(olds[name])

    with new_folder(folder) as temp:
        copy_files(("config.json", *TOKENIZER_FILES), base, temp)
        copy_files(TOKENIZER_FILES, adapter or base, temp)
        if not (base / WHOLE).exists():
            copy_files([INDEX], base, temp)
        for path, kinds in sorted(files.items()):
            write_each(temp / path.name, kinds, tensor, read_header(path)[1])
        if dtype or head:
            sizes = {path.name: {name: math.prod(shape) * kind.itemsize for name, (kind, shape) in kinds.items()}
                     for path, kinds in files.items()}
            describe(temp, config, dtype, head, sizes)
    return merged.share_lost


def describe(folder, config, dtype, head, files):
    """Make config.json, the index and the tokenizer's settings say what merge() has changed. files: as for
    write_index()."""
    if dtype:                           # transformers 5 reads "dtype", older ones "torch_dtype"
        config = {**config, **dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))}
    if head:
        config = classifiers.classifier_config(config, head)
        classifiers.set_padding(folder, head.pad[0])
    write_whole(folder / "config.json", [json.dumps(config, indent=2).encode() + b"\n"])
    if (folder / INDEX).exists():
        write_index(folder, files)
