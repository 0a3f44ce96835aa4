"""[kit] Questions to a checkpoint from the terminal, and the answers of two checkpoints side by side."""
from data import InputError
from rlhf.policy import config_of, open_checkpoint
from rlhf.sampler import longest_answer, sample
from stats.side_by_side import columns, wrapped

FORMS = {"chat": "in the checkpoint's chat template", "alpaca": "in AlpacaFarm's prompt format",
         "text": "as a text to continue"}


def prompt_ids(text, form, prompt):
    """Token ids of a prompt (string) in one of FORMS; InputError if the checkpoint has no such form. A form without the
    chat template takes it away from `text`, so that answers are read without it, too."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8") from None
    if form == "chat" and not text.template:
        raise InputError(f"{text.folder}: there is no chat template: choose --form alpaca or text")
    if form != "chat":
        text.template = None
    return text.plain(prompt) if form == "text" else text.prompt({"instruction": prompt})


def ask(path, prompts, form="", n=1, temperature=1., seed=0, max_new_tokens=0, top_p=1., top_k=0, min_p=0., device="",
        dtype="", int8=False, checkpoint=None):
    """n answers (strings) of a checkpoint to each of the prompts.

    form: one of FORMS; by default chat if the checkpoint has a chat template, alpaca if it was trained by this project
    without one, and otherwise text. temperature 0 takes the likeliest token each time. top_p, top_k, min_p: see
    sampler.likely(). max_new_tokens 0: as in the checkpoint's own run; a thought before the answer has a limit of
    its own, --max_thought_tokens. checkpoint: what open_checkpoint(path) returned, if it is open. InputError if a
    prompt is too long for the model.
    """
    policy, cfg, settings = checkpoint or open_checkpoint(path, device, int8, dtype)
    text = cfg.text()
    trained = policy.role or settings
    form = form or ("chat" if text.template else "alpaca" if trained else "text")
    tokenised = [prompt_ids(text, form, prompt) for prompt in prompts]
    context = policy.gpt.config.max_position_embeddings
    for ids in tokenised:
        if not 0 < len(ids) < context:
            raise InputError(f"the prompt has {len(ids)} tokens, and {path} has room for {context}, with the answer")
    cfg.max_new_tokens = max_new_tokens or cfg.max_new_tokens
    longest = longest_answer(text, cfg)
    limits = [min(context - len(ids), longest) for ids in tokenised for _ in range(n)]
    rows = sample(policy, tokenised, text.stops, limits, temperature, seed, n, top_p=top_p, top_k=top_k, min_p=min_p)
    said = [text.decode(response) for _, response in rows]
    return [said[i:i + n] for i in range(0, len(said), n)]


def compare(path, other, prompts, device="", dtype="", int8=False, **how):
    """The answers of two checkpoints to the prompts, side by side, as text; both draw with the same random numbers.

    how: see ask(). A base that both adapt is loaded once; otherwise one model is in memory at a time.
    """
    base = config_of(other).checkpoint                  # first: if the name is wrong, nothing is loaded in vain
    opened = open_checkpoint(path, device, int8, dtype)
    answers = [ask(path, prompts, checkpoint=opened, **how)]
    opened = opened[0] if opened[1].checkpoint == base else None        # None: its memory is freed before the next load
    opened = open_checkpoint(other, device, int8, dtype, beside=opened)
    answers.append(ask(other, prompts, checkpoint=opened, **how))
    parts = []
    for i, (prompt, *both) in enumerate(zip(prompts, *answers), 1):
        parts += [wrapped(prompt, f"{i}. "), *(columns((path, one), (other, two)) for one, two in zip(*both))]
    return "\n\n".join(parts)
