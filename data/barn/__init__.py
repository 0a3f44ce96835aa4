"""The offline world: a closed, farm-themed English with a known true reward.

lexicon (what is true on the farm) -> world (instructions, demonstrations, splits) -> reward (the hidden true reward)
-> judge (annotators behind HTTP); pretrain makes the base checkpoint in `base/`.
"""
