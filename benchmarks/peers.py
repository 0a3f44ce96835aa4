"""The same work done by Transformers and TRL, for `--against hf` and `--against trl`; nothing else needs this file.

Each function takes our GPT and returns a function run() that does the work once: a rollout, or one optimizer step of
TRL's trainer on the given token ids. Models, data and optimizer are made before, so that only the work is timed. TRL's
tokenizing, checkpoints, reports and progress bars are off, since our side does none of these. Dropout and gradient
checkpointing are off on both sides. TRL's metrics of every step (entropy, accuracy, mean logits) cannot be turned off.

Sources: github.com/huggingface/transformers (models/llama, generation, trainer.py) and github.com/huggingface/trl
(trl/trainer, trl/experimental/ppo); written against transformers 5.23, and TRL 1.16 or for PPO 1.10.
"""
import contextlib
import functools
import gc
import io
import math
import tempfile

import torch
from torch.nn.utils.rnn import pad_sequence

from data import families

PAIR = "prompt", "chosen", "rejected"
EOS = 0                                 # the token that ends an answer; a prompt may contain it


def lora(rank):
    """PEFT's config of our adapters, which are on all linear layers; None for full fine-tuning (rank 0)."""
    if rank:
        from peft import LoraConfig
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def twin(gpt, lora_rank=0, attention="sdpa"):
    """A LlamaForCausalLM with a copy of our base's weights, in the same dtype and on the same device; with
    lora_rank, it gets a new PEFT adapter. attention: the name of one of Transformers' implementations."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    config = LlamaConfig(**families.llama_config(gpt.config), bos_token_id=None, eos_token_id=None)
    with gpt.device:
        llama = AutoModelForCausalLM.from_config(config, dtype=gpt.head.dtype, attn_implementation=attention)
    llama.load_state_dict({**gpt.weights(), "lm_head.weight": gpt.head})
    if lora_rank:
        from peft import get_peft_model
        llama = get_peft_model(llama, lora(lora_rank))
    return llama


def generate(gpt, prompts, caps, slots, n=1, lora_rank=0, attention="sdpa"):
    """Sampling with `generate`: n answers to each prompt, caps[i] tokens in row i; run() returns how many tokens each
    batch has decoded.

    The rows are decoded in batches of `slots`, in the given order and padded on the left, each batch until its longest
    answer ends. A row that has all its tokens is done, by a stopping criterion: to force an EOS takes longer.
    """
    llama, size, batches = twin(gpt, lora_rank, attention).eval(), max(1, slots // n), []
    for start in range(0, len(prompts), size):
        rows, new = [torch.tensor(p) for p in prompts[start:start + size]], caps[start * n:(start + size) * n]
        ids = pad_sequence(rows, True, EOS, "left").to(gpt.device)                       # (P, T)
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left").to(gpt.device)
        ends = ids.shape[1] + torch.tensor(new, device=gpt.device)                       # (P n,)
        stop = {} if len(set(new)) == 1 else {"stopping_criteria": [lambda ids, _, ends=ends: ids.shape[1] >= ends]}
        batches.append({"input_ids": ids, "attention_mask": mask, "max_new_tokens": max(new), "pad_token_id": EOS,
                        "num_return_sequences": n, "do_sample": True, "temperature": 1., "top_k": 0, "top_p": 1.,
                        **stop})

    def run():
        return [llama.generate(**batch).shape[1] - batch["input_ids"].shape[1] for batch in batches]
    return run


def generate_batch(gpt, prompts, caps, slots, n=1, lora_rank=0, page=32):
    """Sampling with the continuous batching of `generate_batch`, whose cache has pages of `page` tokens and as many
    tokens as `slots` rows need; other arguments as in generate(). run() returns the tokens of each answer."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    llama = twin(gpt, lora_rank).eval()
    how = GenerationConfig(do_sample=True, temperature=1., top_k=0, top_p=1., eos_token_id=-1, pad_token_id=EOS)
    rows = [prompt for prompt in prompts for _ in range(n)]
    pages = slots * math.ceil((max(map(len, prompts)) + max(caps)) / page)
    settings = ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=max(512, slots))

    def run():
        with llama.continuous_batching_context_manager(how, continuous_batching_config=settings, block=True) as manager:
            names = [manager.add_request(row, max_new_tokens=cap) for row, cap in zip(rows, caps)]
            done = {}
            while len(done) < len(names):
                result = manager.get_result(timeout=60)             # None if it takes longer
                if result is not None and result.is_finished():
                    done[result.request_id] = len(result.generated_tokens)
        return [done[name] for name in names]
    return run


@contextlib.contextmanager
def settings(gpt, lr):
    """Yield the arguments that all of TRL's trainers get; nothing is printed inside the with block.

    An fp32 base is trained in fp32; for a base of lower precision TRL's default, autocast, is on.
    """
    sink = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield {"output_dir": folder, "learning_rate": lr, "lr_scheduler_type": "constant", "adam_beta2": .98,
               "optim": "adamw_torch_fused", "max_grad_norm": 1., "gradient_checkpointing": False,
               "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
               "bf16": gpt.head.dtype == torch.bfloat16, "fp16": gpt.head.dtype == torch.float16,
               "use_cpu": gpt.device.type == "cpu"}


def tokenizer(pad):
    """A tokenizer with two words, for TRL's trainers: they need its special ids, though no text is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({str(i): i for i in (EOS, pad)}, unk_token=str(EOS)))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(EOS), pad_token=str(pad), padding_side="left")


def stepper(trainer, rows, length, micro=0):
    """A function run() that collates the rows and takes one optimizer step, as Trainer.train does, without callbacks
    and learning-rate schedule; it returns the loss. length: a function that gives the tokens of a row. micro: rows in
    one pass, of similar length; their gradients are accumulated (default: all rows in one pass)."""
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    rows = sorted(rows, key=length)
    parts = [rows[i:i + (micro or len(rows))] for i in range(0, len(rows), micro or len(rows))]
    trainer.current_gradient_accumulation_steps = len(parts)

    def run():
        batches = (trainer.data_collator(part) for part in parts)
        batches, tokens = trainer.get_batch_samples(batches, len(parts), trainer.args.device)
        loss = sum(trainer.training_step(model, inputs, tokens) for inputs in batches)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm).item()
        trainer.optimizer.step()
        model.zero_grad()
        return loss.item()
    return run


def dpo(gpt, pairs, beta, lr, lora_rank=0, precompute_ref=False, micro=0):
    """TRL's DPOTrainer on pairs [(prompt, chosen, rejected)] of token ids. The reference is a copy of the model, or
    with LoRA the base without its adapter. precompute_ref: its log-probs are computed before. micro: see stepper()."""
    import trl
    from datasets import Dataset

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):        # it would tokenize; only SFTTrainer has a flag against it
            return dataset

    data = Dataset.from_list([{part + "_ids": ids for part, ids in zip(PAIR, pair)} for pair in pairs])
    ref = None if lora_rank or precompute_ref else twin(gpt)
    with settings(gpt, lr) as common:
        args = trl.DPOConfig(**common, beta=beta, max_length=None, precompute_ref_log_probs=precompute_ref)
        trainer = Trainer(twin(gpt), ref, args, None, data, None, tokenizer(EOS), peft_config=lora(lora_rank))
    rows = list(trainer.train_dataset)
    return stepper(trainer, rows, lambda row: sum(len(row[part + "_ids"]) for part in PAIR), micro)


def sft(gpt, rows, lr, lora_rank=0, micro=0):
    """TRL's SFTTrainer on rows [(prompt, response)] of token ids, with the loss on the response only. micro: see
    stepper()."""
    import trl
    from datasets import Dataset
    rows = [{"input_ids": prompt + response, "labels": [-100] * len(prompt) + response} for prompt, response in rows]
    with settings(gpt, lr) as common:
        args = trl.SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = trl.SFTTrainer(twin(gpt), args, train_dataset=Dataset.from_list(rows),
                                 processing_class=tokenizer(EOS), peft_config=lora(lora_rank))
    return stepper(trainer, rows, lambda row: len(row["input_ids"]), micro)


def ends_at(ends, gpt):
    """The logits processors of `generate` that make row i end when it has ends[i] tokens, padding and prompt included:
    EOS is the only token that can be sampled at its end, and cannot be sampled earlier."""
    ends = torch.tensor(ends, device=gpt.device)[:, None]                                # (B, 1)
    more = torch.arange(gpt.config.vocab_size, device=gpt.device) != EOS                 # (V,)
    return [lambda ids, scores: scores.masked_fill_((ends <= ids.shape[1] + 1) == more, -torch.inf)]


def ppo(gpt, prompts, caps, mini_batch, epochs, lr):
    """One iteration of TRL's PPOTrainer: a rollout of caps[i] tokens in row i, and `epochs` passes over it; run()
    returns TRL's metrics.

    Policy, reference, reward model and value function are four models of the same size. TRL 1.16 and later have no PPO.
    With unequal caps an EOS is forced, and its log-prob when sampled is 0, so that the metrics KL and ratio are wrong.
    """
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    batch, parts, same = len(prompts), len(prompts) // mini_batch, len(set(caps)) == 1
    policy, ref = twin(gpt), twin(gpt)
    ref.config.num_labels = 1
    with gpt.device:
        reward, value = (AutoModelForSequenceClassification.from_config(ref.config, dtype=ref.dtype) for _ in range(2))
    for scorer in (reward, value):
        scorer.model.load_state_dict(ref.model.state_dict())
    if not same:
        ends = ends_at([max(len(prompt) for prompt in prompts) + cap for cap in caps], gpt)
        policy.generate = functools.partial(policy.generate, logits_processor=ends, pad_token_id=EOS)
    with settings(gpt, lr) as common:
        args = PPOConfig(**common, total_episodes=batch, per_device_train_batch_size=mini_batch, num_mini_batches=parts,
                         gradient_accumulation_steps=parts, num_ppo_epochs=epochs, response_length=max(caps),
                         local_rollout_forward_batch_size=batch, stop_token=None if same else "eos", temperature=1.,
                         num_sample_generations=0)
        # PPOTrainer takes every token that equals the padding id for padding, so the id must never be sampled.
        trainer = PPOTrainer(args, tokenizer(gpt.config.vocab_size), policy, ref, reward,
                             Dataset.from_list([{"input_ids": prompt} for prompt in prompts]), value)
    trainer.accelerator.gradient_accumulation_steps = 1         # TRL sets `parts`; here each mini-batch is a step

    def run(frozen=False):
        """TRL calls the garbage collector twice in a step. It visits every object of every imported library, which on
        a small model takes most of the time. frozen: exclude these objects from the collection."""
        if frozen:
            gc.freeze()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        gc.unfreeze()
        return trainer.state.log_history[-1]
    return run
