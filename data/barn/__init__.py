"""The offline world: a small, farm-themed English with a known true reward.

Each file builds on the ones before it: lexicon (the words, and the facts about them), world (instructions,
demonstrations, splits), reward (the true reward, which no learner sees), judge (annotators that are asked over HTTP).
pretrain makes the base checkpoint in `base/`.
"""
