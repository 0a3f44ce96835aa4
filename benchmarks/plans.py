"""What bench.py measures: shapes of models, lengths of answers, and the benches that `h200` and `cpu` run in turn."""
import torch

# {--preset: (vocabulary, width, width of the MLP, layers, heads, KV heads, whether the head is tied)}
SHAPES = {
    "tiny": (1280, 128, 320, 2, 8, 4, True),            # the offline world's model
    "s": (256, 64, 256, 2, 2, 2, False),
    "m": (1024, 256, 768, 4, 4, 4, False),
    "32k": (32000, 128, 384, 2, 2, 2, False),           # nearly all of its weights are vocabulary
    "135m": (49152, 576, 1536, 30, 9, 3, True),         # SmolLM2
    "0.5b": (151936, 896, 4864, 24, 14, 2, True),       # Qwen2.5
    "1.5b": (151936, 1536, 8960, 28, 12, 2, True),
    "7b": (32000, 4096, 11008, 32, 32, 32, False),      # LLaMA, AlpacaFarm's
    "qwen7b": (152064, 3584, 18944, 28, 28, 4, False),
    "8b": (128256, 4096, 14336, 32, 32, 8, False),      # Llama 3
}
# {--lengths: (median, 90th percentile)}, as fractions of the longest answer: AlpacaFarm's after SFT, and after PPO.
LENGTHS = {"fixed": (1., 1.), "alpaca": (.153, .41), "rlhf": (.5, .95)}

BIG = {"lora_rank": 16, "lengths": "rlhf", "prompt_lengths": "rlhf"}
H200 = [  # (bench, its settings), the most important ones first: --seconds may end before the list does
    ("rollout", {"preset": "7b", "lengths": "fixed", "rows": 128, "slots": 128, "against": ["naive", "hf"]}),
    ("ppo", {**BIG, "preset": "7b", "rows": 512, "batch": 256, "warmup": 0}),
    ("rollout", {"preset": "qwen7b", "lengths": "fixed", "rows": 128, "slots": 128}),
    ("rollout", {**BIG, "preset": "7b", "rows": 512}),
    ("memory", {"preset": "8b", "rows": 32, "slots": 32, "micro_batch_tokens": 2048}),
    ("memory", {"preset": "7b", "rows": 16, "slots": 8, "micro_batch_tokens": 2048}),
    ("memory", {"preset": "7b", "rows": 16, "slots": 8, "micro_batch_tokens": 2048, "int8": True}),
    ("sft", {"preset": "7b", "lengths": "fixed", "rows": 32}),
    ("dpo", {**BIG, "preset": "7b", "lengths": "alpaca", "rows": 32, "against": ["naive", "trl"]}),
    ("rollout", {"preset": "1.5b", "lengths": "fixed", "rows": 128, "slots": 128, "new": 128,
                 "against": ["naive", "hf"]}),
    ("rollout", {"preset": "0.5b", "lengths": "fixed", "rows": 128, "slots": 128, "new": 128,
                 "against": ["naive", "hf"]}),
    ("rollout", {"preset": "0.5b", "lengths": "fixed", "rows": 128, "slots": 128, "new": 128, "lora_rank": 0}),
    ("rollout", {"preset": "7b", "lengths": "fixed", "rows": 128, "slots": 128, "new": 64, "int8": True}),
    ("rollout", {"preset": "1.5b", "lengths": "alpaca", "rows": 512, "slots": 128, "against": ["hf"]}),
    ("logprob", {"preset": "1.5b", "micro_batch_tokens": 16384, "against": ["naive"]}),
    ("memory", {"preset": "1.5b", "rows": 64, "slots": 64}),
    ("ppo", {**BIG, "preset": "1.5b", "rows": 512, "batch": 256, "warmup": 0}),
    ("load", {"preset": "1.5b"}),
    ("sft", {"preset": "7b", "lengths": "fixed", "rows": 32, "compile": True}),
]
EQUAL, ALPACA = {"lengths": "fixed", "prompt": 16, "new": 48}, {"lengths": "alpaca", "prompt": 32, "new": 96}
PAIRS = {"lengths": "fixed", "prompt": 48, "new": 48, "rows": 8}
CPU = [(bench, {"preset": preset, **changes}) for preset in ("s", "m") for bench, changes in (
    ("rollout", {**ALPACA, "rows": 64}), ("rollout", {**EQUAL, "rows": 64}),
    ("rollout", {"lengths": "fixed", "prompt": 128, "new": 64, "rows": 64, "n": 16}),
    ("sft", {**ALPACA, "rows": 32}), ("dpo", {**PAIRS, "cached": False}), ("dpo", PAIRS),
    ("ppo", {**EQUAL, "rows": 32}), ("ppo", {**ALPACA, "rows": 32}))]
SMOLLM2 = {"preset": "135m", "repeat": 3}
REAL = [("rollout", {**SMOLLM2, "prompt": 128, "prompt_lengths": "rlhf", "new": 96, "lengths": "rlhf", "rows": 32}),
        ("dpo", {**SMOLLM2, **PAIRS, "prompt": 64, "new": 64, "rows": 2, "lora_rank": 16}),
        ("sft", {**SMOLLM2, "prompt": 64, "new": 64, "lengths": "fixed", "rows": 4, "lora_rank": 16})]
CPU += REAL + [("dpo", {"preset": "32k", "lengths": "fixed", "prompt": 128, "new": 128, "rows": 4}),
               ("logprob", {"preset": "32k"}), ("load", {"preset": "0.5b", "repeat": 2})]
BF16 = [(bench, {**changes, "dtype": torch.bfloat16}) for bench, changes in REAL]       # where it is quicker
