"""The checkpoint itself: --model answers as it is. Nothing is trained.

Its row on the leaderboard shows whether training has improved on what was downloaded, so farm.py runs this stage before
every other method; if a person is the judge, only with --start base. By itself it has any checkpoint judged:
python farm.py --method base --model runs/barn/dpo.

Memory: one model, without gradients.
Questions a reader asks. Why does the base of the offline world win so rarely? It was trained on texts of that world,
but not on demonstrations: it has not learned to answer.
"""
from dataclasses import dataclass

from rlhf import config, policy
from rlhf.answers import answer

NEEDS = ()


@dataclass
class Config(config.Config):
    def idle(self):
        trains = ("start", "lora_rank", "lora_alpha", "temperature", "max_prompt_tokens", "merge", "checkpointing",
                  "micro_batch_tokens", "compile", "tensorboard")
        return super().idle() | dict.fromkeys(trains, "this stage trains nothing")


def run(cfg):
    model, _, _ = policy.open_checkpoint(cfg.model, cfg.device, cfg.int8, cfg.dtype)
    return answer(model, cfg.text(), cfg)
