"""Train the demo checkpoint: a 1.4M-parameter LFM2 model, its tokenizer and its held-out text.

    python demo/train.py                      # the shipped checkpoint, about twelve minutes on two cores
    python demo/train.py --steps 300 --output ../quick

Everything follows from the seed. A second run on the same machine with the same library versions gives the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from corpus import documents, plain_texts, render, write_heldout
from tokenizer import train_tokenizer
from transformers import GenerationConfig, Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast


FOLDER = Path(__file__).resolve().parent
VOCAB_SIZE = 2048
SEQUENCE = 1024
BATCH = 2
CHUNK = 512
HELDOUT_BYTES = 150_000
TOKENIZER_DOCUMENTS = 12_000
LAYER_TYPES = ["conv", "conv", "full_attention", "conv", "full_attention", "conv", "full_attention"]
SIZE_LIMIT = 3_000_000

STORY_PROMPTS = [
    "Once upon a time there was a girl named Nora",
    "One morning in winter, snow lay on the roofs",
    "In a house by the harbour lived",
    "Dear Tom,\n",
    "Early on Friday Oscar carried a brass bell to the market.",
    "Ivy and Jack were friends, but on Monday they had a quarrel.",
]
CHAT_PROMPTS = [
    "What is 3 plus 4?",
    "Where does a fox live?",
    "What is the capital of France?",
    "I feel sad today.",
    "Hello, I am Clara.",
    "Ben put the silver key next to the well. Where is the silver key?",
]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, heldout: set[str]) -> Iterator[torch.Tensor]:
    """Yield packed batches of fresh text without end. A document that is also held out is skipped."""
    stream: list[int] = []
    need = BATCH * SEQUENCE
    for document in documents(seed):
        text = render(document, tokenizer)
        if text in heldout:
            continue
        stream += tokenizer.encode(text, add_special_tokens=False)
        if len(stream) >= need:
            yield torch.tensor(stream[:need]).view(BATCH, SEQUENCE)
            stream = stream[need:]


def build_model(vocab_size: int) -> Lfm2ForCausalLM:
    """Make the untrained model."""
    config = Lfm2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,  # the MLP takes two thirds of it, rounded up to a multiple of 128, which is 256
        block_auto_adjust_ff_dim=True,
        block_ffn_dim_multiplier=1.0,
        block_multiple_of=128,
        num_hidden_layers=len(LAYER_TYPES),
        layer_types=LAYER_TYPES,
        num_attention_heads=4,
        num_key_value_heads=2,
        conv_L_cache=3,
        conv_bias=False,
        rope_theta=1_000_000.0,
        max_position_embeddings=1024,
        norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=7,
        tie_word_embeddings=True,
    )
    return Lfm2ForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine."""
    warmup = min(100, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Lfm2ForCausalLM, data: Iterator[torch.Tensor], steps: int, peak: float) -> None:
    """Train the model on batches."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(islice(data, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:6.1f} s", flush=True)


@torch.inference_mode()
def heldout_loss(model: Lfm2ForCausalLM, tokens: torch.Tensor) -> float:
    """Return the mean cross-entropy over 512-token chunks of the held-out text."""
    model.eval()
    chunks = tokens[: len(tokens) // CHUNK * CHUNK].view(-1, CHUNK)
    losses = [model(input_ids=part, labels=part, use_cache=False).loss * len(part) for part in chunks.split(8)]
    return float(sum(losses) / len(chunks))


def save(model: Lfm2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model in bfloat16 and the tokenizer."""
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=7, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    # This writes chat_template.jinja. The tokenizer configs of published LFM2 checkpoints contain the template as well.
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": tokenizer.chat_template}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.name}: {size:,} bytes")
    assert size <= SIZE_LIMIT, f"the checkpoint takes {size:,} bytes, more than {SIZE_LIMIT:,}"


def generate(model: Lfm2ForCausalLM, ids: torch.Tensor, count: int) -> list[int]:
    """Return the greedy tokens after a prompt."""
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return output[0, ids.shape[1] :].tolist()


def longest_loop(tokens: list[int], width: int = 8) -> int:
    """Return how often the most frequent run of ``width`` tokens occurs."""
    runs = [tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)]
    return max((runs.count(run) for run in runs), default=0)


def check_stories(model: Lfm2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Assert that stories do not loop and that they differ."""
    seen = set()
    for prompt in STORY_PROMPTS:
        tokens = generate(model, tokenizer(prompt, return_tensors="pt").input_ids, 64)
        print(f"\n> {prompt}\n{tokenizer.decode(tokens)}")
        assert len(set(tokens)) >= len(tokens) // 3, "too few distinct tokens"
        assert longest_loop(tokens) <= 2, "the continuation runs in a loop"
        seen.add(tuple(tokens))
    assert len(seen) == len(STORY_PROMPTS), "two prompts have the same continuation"


def check_chats(model: Lfm2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Assert that answers end."""
    for prompt in CHAT_PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        tokens = generate(model, ids, 64)
        print(f"\n? {prompt}\n{tokenizer.decode(tokens)}")
        assert tokens[-1] == tokenizer.eos_token_id, "the answer does not end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3300)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for checkpoint/ and heldout.txt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()

    args.output.mkdir(parents=True, exist_ok=True)
    heldout_path = args.output / "heldout.txt"
    tokenizer = train_tokenizer(plain_texts(args.seed, TOKENIZER_DOCUMENTS), VOCAB_SIZE, max_length=1024)
    heldout = write_heldout(heldout_path, tokenizer, args.seed + 1, HELDOUT_BYTES)
    text = heldout_path.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    model = build_model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens; held out: {len(tokens):,} tokens")
    print(f"untrained held-out perplexity {math.exp(heldout_loss(model, tokens)):.1f}")

    train(model, batches(tokenizer, args.seed, heldout), args.steps, args.lr)
    save(model, tokenizer, args.output / "checkpoint")

    model = Lfm2ForCausalLM.from_pretrained(args.output / "checkpoint", dtype=torch.float32)
    print(f"held-out perplexity {math.exp(heldout_loss(model, tokens)):.4f} (stored bfloat16 weights, float32 compute)")
    check_stories(model, tokenizer)
    check_chats(model, tokenizer)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
