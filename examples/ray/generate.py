"""Answers to the texts of a table, by many actors: `python examples/ray/generate.py MODEL SOURCE OUT`.

MODEL is an export of a model that chats. Each text is a user's message. OUT/results gets the columns id and answer.
"""

from __future__ import annotations

from typing import Any

from tables import arguments, process, session_options


class Generator:
    """Writes answers. The rows of a batch are padded on the left, and each gets the answer that it gets alone.

    Args:
        folder: the exported folder.
        cores: that its session may take.
        new: tokens of an answer at most.
    """

    def __init__(self, folder: str, cores: int, new: int) -> None:
        from transformers import AutoTokenizer

        from optimum_lfm2 import ORTLfm2ForCausalLM

        self._model = ORTLfm2ForCausalLM.from_pretrained(folder, session_options=session_options(cores))
        self._tokenizer, self._new = AutoTokenizer.from_pretrained(folder, padding_side="left"), new

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        chats = [[{"role": "user", "content": text}] for text in batch["text"].tolist()]
        inputs = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        out = self._model.generate(**inputs, max_new_tokens=self._new)
        answers = self._tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return {"id": batch["id"], "answer": answers}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer at most")
    args = parser.parse_args(argv)
    process(Generator, args, new=args.new)


if __name__ == "__main__":
    main()
