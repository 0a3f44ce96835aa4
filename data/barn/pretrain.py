"""Train the tokenizer and the small base checkpoint of the offline world: `python -m data.barn.pretrain`.

The base model must learn above all to copy words from the instruction into the answer. Therefore most of its texts are
questions with good answers, and the tokenizer has a token for each word. The texts contain no instruction of any split
(see world.pretraining_texts). Training takes minutes on one core; the result is the Hugging Face folder data/barn/base.
"""
import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import families, run, underscored
from data.barn import world
from data.weights import save_pretrained
from model import GPT, GPTConfig
from rlhf.config import BASE
from rlhf.logprobs import pack, token_logps
from rlhf.policy import Policy
from rlhf.update import Updater, batches, micro_batches

SPECIAL = ("<pad>", "<user>", "<assistant>", "<end>")
END = SPECIAL.index("<end>")
SIZE = GPTConfig(vocab_size=1280, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=8,
                 num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True)
TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


def train_tokenizer(texts):
    """A byte-level BPE tokenizer of SIZE.vocab_size tokens, trained on these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)   # one token for a word wherever it is
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=SIZE.vocab_size, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def initialise(gpt):
    """Draw the matrices from normal distributions, in place: the embedding, which is also the head, with a small sd,
    the others with one that keeps the variance of their input."""
    for name, weight in gpt.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=.02 if "embed" in name else .7 / weight.shape[1] ** .5)


def train(gpt, rows, held_out, lr, batch_size):
    """One pass over the rows [(prompt ids, response ids)]; prints the losses every 200 steps.

    Each document is the response to a prompt of one token, <end>. held_out: rows for the second loss that is printed.
    """
    policy = Policy(gpt)
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    steps = batches(len(rows), batch_size, 1, seed=0)
    updater = Updater(policy.trainable(), lr, len(steps), weight_decay=.05)
    start = time.perf_counter()
    for step, batch in enumerate(steps):
        nll = 0.
        for micro in micro_batches(batch, lengths, 1024):
            ids, mask = pack([rows[i] for i in micro])
            loss = -token_logps(policy, ids, mask).sum()
            updater.add(loss, mask.sum().item())
            nll += loss.item()
        nll /= updater.denominator
        updater.step()
        if step % 200 == 0 or step + 1 == len(steps):
            with torch.no_grad():
                ids, mask = pack(held_out)
                held_out_nll = -token_logps(policy, ids, mask).sum() / mask.sum()
            print(f"{step + 1:>5}/{len(steps)} | loss {nll:.3f} | held out {held_out_nll:.3f} | "
                  f"{time.perf_counter() - start:.0f} s", flush=True)


def main(argv):
    parser = argparse.ArgumentParser("python -m data.barn.pretrain", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)
    parser.add_argument("--documents", type=int, default=120_000, help="texts to train on, each once [120000]")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate [0.005]")
    parser.add_argument("--batch_size", type=int, default=32, help="texts in an optimizer step [32]")
    parser.add_argument("--out", default=str(BASE), help="folder to write [data/barn/base]")
    args = parser.parse_args(underscored(argv))
    torch.set_num_threads(1)            # more threads help little, and add in another order, which gives other weights
    torch.manual_seed(0)
    texts = list(world.pretraining_texts(args.documents))
    tokenizer = train_tokenizer(texts[:20_000])
    rows = [([END], encoding.ids + [END]) for encoding in tokenizer.encode_batch(texts)]
    held_out = [([END], tokenizer.encode(f"Q: {record['instruction']} A: {record['output']}").ids + [END])
                for record in world.splits()["val"][:200]]
    gpt = GPT(SIZE)
    initialise(gpt)
    print(f"{sum(w.numel() for w in gpt.parameters()):,} parameters, {sum(len(y) for _, y in rows):,} tokens")
    train(gpt, rows, held_out, args.lr, args.batch_size)

    config = {**families.llama_config(SIZE), "bos_token_id": None, "eos_token_id": END, "pad_token_id": 0,
              "torch_dtype": "float32"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>",
                "model_max_length": SIZE.max_position_embeddings, "chat_template": TEMPLATE}
    with TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        save_pretrained(args.out, gpt.weights(), config, folder)


if __name__ == "__main__":
    run(main, "data.barn.pretrain", "no folder was written")
