"""A mixture of experts in the place of an MLP (Shazeer et al. 2017), as in Qwen3-MoE and OLMoE.

A router chooses k experts for each token. Each of them is an MLP, and their outputs are added, weighted with the
router's probabilities. Router and experts have no adapters, as is PEFT's default: with LoRA, only attention is trained.
Left out: the loss that keeps the experts equally busy, int8.
Letters: N tokens, D width, F width of an expert, E experts, k experts of a token.
"""
import torch
import torch.nn as nn

# On a GPU, for so few tokens reading the weights of an expert takes longer than computing all of the tokens with it.
FEW = 512


class Expert(nn.Module):
    def __init__(self, D, inner, act):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, inner, bias=False), nn.Linear(D, inner, bias=False)
        self.down_proj, self.act = nn.Linear(inner, D, bias=False), act

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    linears = ()                # unlike an MLP, it has no layers that get adapters or are fused for sampling

    def __init__(self, c, act):
        super().__init__()
        self.k, self.normalised = c.num_experts_per_tok, c.norm_topk_prob
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(c.hidden_size, c.moe_intermediate_size, act) for _ in range(c.num_experts))

    def forward(self, x, role):
        """x (..., D) -> (..., D). `role` is ignored, since there are no adapters."""
        tokens = x.flatten(0, -2)                                                        # (N, D)
        share, chosen = self.gate(tokens).float().softmax(-1).topk(self.k)               # (N, k) each
        if self.normalised:
            share = share / share.sum(-1, keepdim=True)
        few = x.is_cuda and len(tokens) <= FEW and not torch.is_grad_enabled()
        y = (self.all_experts if few else self.chosen_experts)(tokens, share.to(x.dtype), chosen)
        return y.view(x.shape)

    def chosen_experts(self, x, share, chosen):
        """Each expert computes only its own tokens. The host waits for the GPU to learn how many these are.

        Choice j of token i has index i k + j. With k 2 and chosen [[5, 1], [1, 3]], order is [1, 2, 3, 0]; order // k,
        the tokens, is [0, 1, 1, 0]: expert 1 computes tokens 0 and 1, expert 3 token 1, expert 5 token 0.
        """
        order = chosen.flatten().argsort(stable=True)       # (N k,): indices of choices, sorted by expert
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = x.index_select(0, order // self.k).split(counts)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])       # (N k, D)
        y = y.index_select(0, order.argsort()).view(*chosen.shape, x.shape[-1])          # (N, k, D)
        return (y * share[..., None]).sum(1)

    def all_experts(self, x, share, chosen):
        """The same result, but every expert computes all tokens; those that are not its own get weight 0. The host
        never waits, so a CUDA graph can capture it."""
        weight = share.new_zeros(len(x), len(self.experts)).scatter(1, chosen, share)    # (N, E)
        return sum(expert(x) * weight[:, e, None] for e, expert in enumerate(self.experts))
