"""Train the demo checkpoint that sees: a tiny LFM2-VL model and its tokenizer.

    python demo/train_vision.py                      # the shipped checkpoint, some minutes on one core
    python demo/train_vision.py --steps 200 --output ../quick

Everything follows from the seed. A second run on the same machine with the same library versions gives the same model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from drawings import COLOURS, SHAPES, Picture, drawings
from patches import FACTOR, LEAST_TOKENS, MOST_TOKENS, PATCH, SIDE, patches
from questions import Turn, questions
from tokenizer import BOS, EOS, IMAGE_TOKENS, MOST_TILES, train_tokenizer
from train import learning_rate
from transformers import GenerationConfig, Lfm2VlConfig, PreTrainedTokenizerFast
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlForConditionalGeneration


FOLDER = Path(__file__).resolve().parent
VOCAB_SIZE = 512
QUESTIONS = 4  # about a picture
BATCH = 32
SIZE_LIMIT = 4_000_000
ASKED_WEIGHT = 0.1  # in the loss, of what a user says. An answer has 1
IMAGE, START, END = (IMAGE_TOKENS[name] for name in ("image_token", "image_start_token", "image_end_token"))
# What the features of a square with a thing are to say of it.
WORDS = [*COLOURS, *SHAPES, "top", "bottom", "left", "right"]
LINE, ASK, ANSWER = "\n", "<|im_start|>user\n", f"{EOS}\n<|im_start|>assistant\n"

# What transformers' processor reads. A picture of any size is one tile of at most 16 picture tokens.
PREPROCESSOR = {
    "image_processor_type": "Lfm2VlImageProcessorFast",
    "processor_class": "Lfm2VlProcessor",
    "encoder_patch_size": PATCH,
    "downsample_factor": FACTOR,
    "min_image_tokens": LEAST_TOKENS,
    "max_image_tokens": MOST_TOKENS,
    "do_image_splitting": False,
    "min_tiles": 2,
    "max_tiles": MOST_TILES,
    "tile_size": 4 * SIDE,
    "use_thumbnail": True,
    "max_pixels_tolerance": 2.0,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pad": True,
    "resample": 2,
}


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on questions and answers."""
    found = islice(drawings(seed), 2000)
    turns = [turn for picture, rng in found for turn in questions(rng, picture, QUESTIONS)]
    texts = [f"user\n{question}\nassistant\n{answer}" for question, answer in turns]
    return train_tokenizer(texts, VOCAB_SIZE, max_length=1024, takes_pictures=True)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Lfm2VlForConditionalGeneration:
    """Make the untrained model."""
    text = {
        "model_type": "lfm2",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "block_auto_adjust_ff_dim": False,
        "initializer_range": 0.1,
        "num_hidden_layers": 5,
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "conv_L_cache": 3,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 1024,
        "norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 7,
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_patches": MOST_TOKENS * FACTOR**2,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    config = Lfm2VlConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=128,
        downsample_factor=FACTOR,
        bos_token_id=1,
        eos_token_id=7,
        pad_token_id=0,
    )
    return Lfm2VlForConditionalGeneration(config)


class Encoder:
    """Makes token ids of chats, as the processor does. Each text is tokenised once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.known[text]

    def chat(self, turns: list[Turn], picture_tokens: int) -> tuple[list[int], list[float]]:
        """Return the ids of a chat about a picture, and how much each of them counts in the loss."""
        shown = self.ids(f"{BOS}{ASK}{START}{IMAGE * picture_tokens}{END}")
        ids, weights = list(shown), [0.0] * len(shown)
        for i, (question, answer) in enumerate(turns):
            asked = self.ids(f"{f'{LINE}{ASK}' if i else ''}{question}{ANSWER}")
            said = self.ids(f"{answer}{EOS}")
            ids += asked + said
            weights += [ASKED_WEIGHT] * len(asked) + [1.0] * len(said)
        return ids, weights


def batches(encoder: Encoder, seed: int) -> Iterator[tuple[list[Picture], torch.Tensor, torch.Tensor]]:
    """Yield pictures of one size, with the ids of a chat about each and their weights in the loss, without end."""
    waiting: dict[tuple[int, int], list] = defaultdict(list)
    for picture, rng in drawings(seed):
        rows = waiting[picture.size]
        rows.append((picture, *encoder.chat(questions(rng, picture, QUESTIONS), picture_tokens(picture))))
        if len(rows) < BATCH:
            continue
        longest = max(len(ids) for _, ids, _ in rows)
        ids, weights = torch.zeros(BATCH, longest, dtype=torch.int64), torch.zeros(BATCH, longest)
        for i, (_, own_ids, own_weights) in enumerate(rows):
            ids[i, : len(own_ids)], weights[i, : len(own_ids)] = torch.tensor(own_ids), torch.tensor(own_weights)
        yield [picture for picture, *_ in rows], ids, weights
        rows.clear()


def picture_tokens(picture: Picture) -> int:
    return picture.height * picture.width // SIDE**2


def features_of(model: Lfm2VlForConditionalGeneration, shown: list[Picture]) -> torch.Tensor:
    """Return the features of pictures of one size, (pictures, rows, columns, hidden_size)."""
    inputs = patches(np.stack([picture.pixels() for picture in shown]))
    rows, columns = inputs["spatial_shapes"][0].tolist()
    seen = model.model.vision_tower(**inputs).last_hidden_state[:, : rows * columns]
    return model.model.multi_modal_projector(seen.reshape(len(shown), rows, columns, -1))


def answer_loss(
    model: Lfm2VlForConditionalGeneration, features: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted cross-entropy of chats. A causal model never sees the padding after a row's end."""
    embeds = model.get_input_embeddings()(ids)
    places = (ids == model.config.image_token_id)[:, :, None]
    embeds = embeds.masked_scatter(places, features.flatten(0, 2))
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    counts = weights[:, 1:] > 0
    losses = F.cross_entropy(model.lm_head(hidden[:, :-1][counts]), ids[:, 1:][counts], reduction="none")
    return (losses * weights[:, 1:][counts]).sum() / (weights == 1).sum()


class Reader(torch.nn.Module):
    """Asks each feature which words say what has its centre in the feature's square, and where the centre is.

    A word is asked for with its own embedding, so that features are made of the words that the decoder will need.
    """

    def __init__(self, encoder: Encoder, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.ids = [encoder.ids(f" {word}") for word in WORDS]
        self.bias = torch.nn.Parameter(torch.zeros(len(WORDS)))
        self.place = torch.nn.Linear(embedding.embedding_dim, 2)

    def forward(self, features: torch.Tensor, shown: list[Picture]) -> torch.Tensor:
        """Return the loss of pictures of one size, whose features `features_of` has computed."""
        wanted, places = torch.zeros(*features.shape[:3], len(WORDS)), torch.zeros(*features.shape[:3], 2)
        for i, picture in enumerate(shown):
            for thing in picture.things:
                square = i, int(thing.y / SIDE), int(thing.x / SIDE)
                x, y = thing.x / picture.width, thing.y / picture.height
                words = thing.colour, thing.shape, "top" if y < 0.5 else "bottom", "left" if x < 0.5 else "right"
                wanted[square][[WORDS.index(word) for word in words]] = 1
                places[square] = torch.tensor([x, y])
        said = F.linear(features, self.embedding(torch.tensor(self.ids)[:, 0]), self.bias)
        taken = wanted.amax(-1) > 0
        loss = F.binary_cross_entropy_with_logits(said, wanted, reduction="none").sum(-1).mean()
        return loss + F.mse_loss(self.place(features[taken]), places[taken])


def losses(
    model: Lfm2VlForConditionalGeneration, reader: Reader, data: Iterator, answers: bool
) -> Iterator[torch.Tensor]:
    """Yield the loss of each batch: of what the features say, and if wanted of what the decoder answers."""
    for shown, ids, weights in data:
        features = features_of(model, shown)
        loss = reader(features, shown)
        yield loss + answer_loss(model, features, ids, weights) if answers else loss


def train(modules: list[torch.nn.Module], losses: Iterator[torch.Tensor], steps: int, peak: float) -> None:
    """Train modules: `losses` yields the loss of each batch."""
    parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    start, total = time.perf_counter(), 0.0
    for step, loss in enumerate(islice(losses, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        if step % 100 == 99:
            print(f"step {step + 1:5d}  loss {total / 100:.4f}  {time.perf_counter() - start:6.1f} s", flush=True)
            total = 0.0


@torch.inference_mode()
def accuracy(model: Lfm2VlForConditionalGeneration, encoder: Encoder, seed: int, held_out: bool, count: int) -> float:
    """Print and return the share of answers that are right to the letter: a picture, one question, a greedy answer."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for picture, rng in islice(drawings(seed, held_out), count):
        shown = patches(picture.pixels()[None])
        for question, answer in questions(rng, picture, 2):
            ids, weights = (torch.tensor(x) for x in encoder.chat([(question, answer)], picture_tokens(picture)))
            logits = model(input_ids=ids[None], use_cache=False, **shown).logits[0, :-1]
            # Greedy decoding says the answer if each of its tokens is the most likely one after those before it.
            said = logits.argmax(-1) == ids[1:]
            right[" ".join(question.split()[:2])].append(bool(said[weights[1:] == 1].all()))
    answers = [one for ones in right.values() for one in ones]
    share = sum(answers) / len(answers)
    print(f"{'held-out pairs' if held_out else 'another seed'}: {share:.4f} of {len(answers)} answers are right")
    print("  " + ", ".join(f"{name} {sum(ones) / len(ones):.3f}" for name, ones in sorted(right.items())), flush=True)
    return share


def save(model: Lfm2VlForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model in bfloat16, with its tokenizer and the settings of its processor."""
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=7, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    # transformers 4.57 writes a model type that no release reads.
    change(folder / "config.json", model_type="lfm2_vl")
    # This writes chat_template.jinja. Transformers.js looks for the template in the tokenizer's config.
    tokenizer.save_pretrained(folder)
    change(folder / "tokenizer_config.json", chat_template=tokenizer.chat_template, processor_class="Lfm2VlProcessor")
    change(folder / "preprocessor_config.json", **PREPROCESSOR)
    change(folder / "processor_config.json", processor_class="Lfm2VlProcessor")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.name}: {size:,} bytes")
    assert size <= SIZE_LIMIT, f"the checkpoint takes {size:,} bytes, more than {SIZE_LIMIT:,}"


def change(path: Path, **settings: object) -> None:
    """Add settings to a JSON file, or make one of them."""
    written = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(written | settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--first-steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for vision_checkpoint/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.perf_counter()

    folder = args.output / "vision_checkpoint"
    tokenizer = build_tokenizer(args.seed)
    encoder = Encoder(tokenizer)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    model.train()
    data = batches(encoder, args.seed)
    reader = Reader(encoder, model.get_input_embeddings())
    eyes = [model.model.vision_tower, model.model.multi_modal_projector, reader]
    train(eyes, losses(model, reader, data, answers=False), args.first_steps, args.lr)
    train([model, reader], losses(model, reader, data, answers=True), args.steps, args.lr)
    save(model, tokenizer, folder)

    model = Lfm2VlForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for held_out in (False, True):
        accuracy(model, encoder, args.seed + 1, held_out, count=200)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
