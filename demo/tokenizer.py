"""A byte-level BPE tokenizer with the special tokens and the chat template conventions of LFM2."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


BOS = "<|startoftext|>"
EOS = "<|im_end|>"
SPECIAL_TOKENS = [
    "<|pad|>", BOS, "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>", EOS,
]  # fmt: skip
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The names by which transformers' Lfm2VlProcessor asks a tokenizer for its tokens.
IMAGE_TOKENS = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail": "<|img_thumbnail|>",
}
MOST_TILES = 10  # of a large picture
TILE_TOKENS = [
    f"<|img_row_{row}_col_{column}|>"
    for row in range(1, MOST_TILES + 1)
    for column in range(1, MOST_TILES // row + 1)
]  # fmt: skip
# The content of a message is text, or a list of pictures and texts.
VISION_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\\n' }}",
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int, takes_pictures: bool = False
) -> PreTrainedTokenizerFast:
    """Train the tokenizer on texts and return it. One that takes pictures has the tokens of LFM2-VL too."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *((*IMAGE_TOKENS.values(), *TILE_TOKENS) if takes_pictures else ())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token="<|pad|>",
        chat_template=VISION_CHAT_TEMPLATE if takes_pictures else CHAT_TEMPLATE,
        extra_special_tokens=IMAGE_TOKENS if takes_pictures else {},
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
