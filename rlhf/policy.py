"""[kit] A policy is a GPT and one of its roles: how it is loaded, copied and saved."""
import copy
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

import model
from data import InputError, adapters, classifiers, families, read_json, weights
from products import bf16_pays
from rlhf.config import Config, resolve, stage
from rlhf.sampler import longest_answer

HUB = "https://huggingface.co/"         # a name on the hub may be copied from a browser
HEAD_FILE = "head.safetensors"          # of a reward model, beside its adapter or its weights
WIDE = 512                              # hidden size from which bf16 is quicker on CPUs that have it
MUCH_LOST = .1                          # merge() warns if rounding loses more than this share of an update


@dataclass
class Policy:
    """One role of a model. With LoRA, role names an adapter on the frozen base that all roles share. With full
    fine-tuning, role is None and the policy has a model of its own."""
    gpt: model.GPT
    role: str | None = None
    engines: dict = field(default_factory=dict, kw_only=True, repr=False)   # for its next sampling: see graphs.py

    def hidden(self, ids, pos=None, attends=None, where=None):
        """GPT.hidden() of this role."""
        with self.gpt.using(self.role):
            return self.gpt.hidden(ids, pos, attends, where)

    @property
    def fp16(self):
        """Whether activations are in fp16, so that the loss has to be scaled."""
        return self.gpt.head.dtype == torch.float16

    def params(self):
        """The parameters that are this policy's own."""
        return list(self.gpt.adapter(self.role).values() if self.role else self.gpt.parameters())

    def trainable(self):
        """The parameters that are trained, all fp32. Their gradients are switched on by this call."""
        params = self.params()
        assert all(p.dtype == torch.float32 for p in params), "low precision would swallow small updates"
        return [p.requires_grad_() for p in params]

    def state_dict(self):
        return [p.detach() for p in self.trainable()]

    @torch.no_grad()
    def load_state_dict(self, tensors):
        for p, tensor in zip(self.trainable(), tensors, strict=True):
            p.copy_(tensor)

    @torch.no_grad()
    def become(self, other):
        """Take the weights of the policy that this one is a copy of."""
        for p, theirs in zip(self.params(), other.params(), strict=True):
            p.copy_(theirs)

    def copy(self, role):
        """A copy that can be trained without changing this policy: a new role on the same base, or a second model."""
        if self.role is None:
            gpt = copy.deepcopy(self.gpt)
            gpt.make_contiguous()
            return Policy(gpt)
        self.gpt.add_role(role, *self.size(), start=self.role)
        return Policy(self.gpt, role)

    def size(self):
        """(rank, alpha) of the adapter."""
        lora = self.gpt.linears()[0][1]
        rank = len(lora.lora_A[self.role])
        return rank, lora.scale[self.role] * rank


# -- on disk -------------------------------------------------------------------------------------------------------

def load_base(cfg, classifier=False):
    """The base checkpoint of a run, frozen, on its device and in its precision; of a classifier, the decoder."""
    device, dtype = precision(cfg)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32, where weights are fp32
    gpt = model.load(cfg.checkpoint, "cpu" if cfg.int8 else device, getattr(torch, dtype), classifier)
    if cfg.int8:
        gpt.quantise()                                  # before it moves to a GPU that may be too small for 16 bits
        gpt.to(device).make_contiguous()
    if cfg.compile:
        gpt.compile_blocks()
    gpt.checkpointing = cfg.checkpointing
    return gpt


def precision(cfg):
    """(device, dtype) of a run's base, as in ("cuda", "bfloat16")."""
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here")
    return device, cfg.dtype or (usual_dtype(device, cfg.checkpoint) if cfg.lora_rank else "float32")


def usual_dtype(device, checkpoint):
    """The precision of a frozen base, if --dtype says nothing: 16 bits where they are quicker. Weights that are trained
    have to be fp32."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    size = read_json(checkpoint / "config.json").get("hidden_size")
    wide = isinstance(size, int) and size >= WIDE
    return "bfloat16" if wide and bf16_pays() else "float32"


def fresh(cfg, role):
    """The policy that training starts from, which answers as --model does. That is a fresh adapter on the base, or with
    lora_rank 0 the base itself. If --model is an adapter, it is that adapter, or with lora_rank 0 the base with the
    adapter merged into it. InputError if the context is too short or the adapter has another rank or alpha."""
    gpt = load_base(cfg)
    text = cfg.text()
    context, longest = gpt.config.max_position_embeddings, cfg.max_prompt_tokens + longest_answer(text, cfg)
    if longest > context:
        thought = ", --max_thought_tokens" * text.thinks
        raise InputError(f"{cfg.model} knows {context} positions, but a prompt and its answer may take {longest}: "
                         f"lower --max_prompt_tokens{thought} or --max_new_tokens")
    torch.manual_seed(cfg.seed)
    if not cfg.adapter:
        if cfg.lora_rank:
            gpt.add_role(role, cfg.lora_rank, cfg.lora_alpha)
        return Policy(gpt, role if cfg.lora_rank else None)
    policy = with_adapter(gpt, role, cfg.adapter)
    if not cfg.lora_rank:
        gpt.merge(role)
        return Policy(gpt)
    rank, alpha = policy.size()
    if rank != cfg.lora_rank or not math.isclose(alpha, cfg.lora_alpha, rel_tol=1e-4):
        raise InputError(f"{cfg.model} is an adapter of another size: give --lora_rank {rank} --lora_alpha {alpha:g}")
    return policy


def start(cfg):
    """The policy that learning starts from, frozen: the SFT stage of the run, or with --start base what --model is."""
    if cfg.start == "sft":
        return load(cfg, "sft")
    policy = fresh(cfg, "base")
    policy.gpt.requires_grad_(False)
    return policy


def save(policy, cfg):
    """Write the policy to its stage's folder: a PEFT adapter of the base checkpoint, or a Hugging Face checkpoint."""
    folder = cfg.dir() / "checkpoint"
    if not all(map(weights.is_finite, policy.params())):
        raise FloatingPointError("the trained weights are not finite, so they are not saved: try a lower --lr")
    if policy.role:
        rank, alpha = policy.size()
        base = cfg.base.partition("@")[0] if cfg.revision else cfg.base
        own_tokenizer = cfg.tokenizer[0] if cfg.tokenizer[0] != cfg.checkpoint else None
        adapters.save_adapter(folder, policy.gpt.adapter(policy.role), rank, alpha, policy.gpt.targets(), base,
                             policy.gpt.config.transposed, cfg.revision or None, own_tokenizer)
    else:                               # transformers 5 reads "dtype", older ones "torch_dtype"
        config = {**families.text_config(read_json(cfg.checkpoint / "config.json")),
                  "tie_word_embeddings": policy.gpt.config.tie_word_embeddings,
                  "dtype": "float32", "torch_dtype": "float32"}
        weights.save_pretrained(folder, policy.gpt.weights(), config, cfg.tokenizer[0])


def load(cfg, stage, beside=None):
    """The policy that `stage` of the same run has saved, frozen. With LoRA it is a role with the stage's name, on the
    base of the policy `beside` if that is given."""
    folder = cfg.dir(stage) / "checkpoint"
    if not cfg.lora_rank:
        return Policy(load_base(dataclasses.replace(cfg, model=str(folder))))
    return with_adapter(beside.gpt if beside else load_base(cfg), stage, folder)


def with_adapter(gpt, role, folder):
    """The frozen policy with the adapter of a PEFT folder as `role`. Layers that the folder does not adapt get a fresh
    adapter, which changes nothing."""
    tensors, config = adapters.load_adapter(folder)
    gpt.add_role(role, config["r"], adapters.lora_scale(config) * config["r"])
    ours = gpt.adapter(role)
    weights.assign({name: ours[name] for name in ours if name in tensors}, tensors, str(folder))
    gpt.requires_grad_(False)
    return Policy(gpt, role)


def open_checkpoint(path, device="", int8=False, dtype="", beside=None):
    """(policy, Config, settings) of anything that can answer: whatever --model takes, or a stage of a run. settings:
    those that the stage ran with, {} for anything else. beside: a policy on the same base, which is then not loaded
    again. InputError for a reward model."""
    path = str(path).removeprefix(HUB)
    folder, settings = resolve(path), stage(Path(path))
    if (folder / HEAD_FILE).exists() or classifiers.is_classifier(folder):
        raise InputError(f"{path} is a reward model, which scores texts and writes none")
    cfg = config_of(path, device, int8, dtype)
    return body_of(path, cfg, beside), cfg, settings


def config_of(path, device="", int8=False, dtype=""):
    """The Config with which a checkpoint or a reward model is loaded."""
    folder = resolve(str(path).removeprefix(HUB))
    adapted = (folder / "adapter_config.json").exists()
    made = stage(Path(path))
    moved = adapted and made.get("model") == "barn"     # so that the base is found if the project has moved
    kept = {name: made[name] for name in ("template", "max_new_tokens", "max_thought_tokens") if name in made}
    cfg = Config(model="barn" if moved else str(folder), device=device, int8=int8, dtype=dtype, **kept)
    cfg.day = made.get("day", cfg.day)
    return cfg


def body_of(path, cfg, beside=None):
    """The policy in a checkpoint; of a reward model, the decoder without its head. cfg: from config_of(). beside: a
    policy on the same base."""
    folder = resolve(path)
    gpt = beside.gpt if beside else load_base(cfg, classifiers.is_classifier(folder))
    role = "other" if beside else "policy"
    return with_adapter(gpt, role, folder) if (folder / "adapter_config.json").exists() else Policy(gpt)


def merge(cfg):
    """Write what a finished stage has trained as one Hugging Face checkpoint, the adapter merged into its base. A
    reward model becomes a folder that transformers loads as a classifier with one label. Returns a text for the user.
    """
    folder, merged = cfg.dir() / "checkpoint", cfg.dir() / "merged"
    adapter = folder if (folder / "adapter_config.json").exists() else None
    head = reward_head(cfg, folder) if (folder / HEAD_FILE).exists() else None
    dtype = getattr(torch, cfg.merge_dtype) if cfg.merge_dtype else None
    lost = adapters.merge(merged, adapter, cfg.checkpoint if adapter else folder, dtype, head)
    said = [f"{'the reward model' if head else 'the adapter, merged into its base'}: {merged}"]
    if adapter:
        said.append(f"rounding lost {lost:.1%} of what the adapter adds to the weights")
    if lost > MUCH_LOST:
        said.append("which is much: give --merge_dtype float32, or use the adapter as it is")
    if head:
        said.append(f"the run's scores are these plus {head.bias:.6g}, which config.json has as score_bias")
    return "\n".join(said)


def reward_head(cfg, folder):
    """The Head of a reward model in a stage's folder."""
    tensors, _ = weights.read_safetensors(folder / HEAD_FILE)
    return classifiers.Head(tensors["score.weight"], tensors["score.bias"].item(), classifiers.padding(cfg.text()))
