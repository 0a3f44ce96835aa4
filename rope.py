"""Rotary positions: the angles of each kind of RoPE that config.json can name, and the rotation.

Left out: dynamic and longrope, whose angles depend on how long the text has become.
"""
import math

import torch


def frequencies(rope, dim):
    """(radians a position (dim / 2,), the factor of cos and sin) of rotary embeddings: the default (Su et al. 2021),
    linear (positions are divided), llama3 (only slow ones are), yarn (Peng et al. 2023, section 3.2)."""
    freq = rope["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)                        # (dim / 2,)
    kind = rope["rope_type"]
    if kind == "default":
        return freq, 1.
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    if kind == "linear":
        return freq / factor, 1.
    if kind == "llama3":                    # how far each is kept: by its turns in the context of pretraining
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((context * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return freq * (kept + (1 - kept) / factor), 1.

    def place(turns):                       # of the frequency that makes so many turns in that context
        return dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(rope["rope_theta"]))
    low, high = place(rope.get("beta_fast") or 32), place(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    kept = 1 - ((torch.arange(dim // 2) - low) / (high - low or .001)).clamp(0, 1)
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    above, below = (above, below) if above and below else (1, 0)
    log = .1 * math.log(max(factor, 1))
    return freq * kept + freq / factor * (1 - kept), rope.get("attention_factor", (above * log + 1) / (below * log + 1))


def rotate(x, cos, sin):
    """Rotary embedding (Su et al. 2021), halves convention of HF: x (..., heads, hd), cos and sin (..., 1, rotary_dim),
    the first half of sin for the negative angle. What is beyond rotary_dim stays."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), -1)
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
