"""Vectors of the texts of a table, by many actors: `python examples/ray/embed.py MODEL SOURCE OUT`.

MODEL is an export of an encoder. OUT/results gets the columns id and embedding.
"""

from __future__ import annotations

from typing import Any

from tables import arguments, process, session_options


class Embedder:
    """Makes vectors.

    Args:
        folder: the exported folder.
        cores: that its session may take.
        prompt: the name of the checkpoint's prompt, such as `document`, or None.
    """

    def __init__(self, folder: str, cores: int, prompt: str | None) -> None:
        import optimum_lfm2  # noqa: F401  before sentence-transformers, on transformers 5

        # isort: split
        from sentence_transformers import SentenceTransformer

        options = {"session_options": session_options(cores)}
        self._model, self._prompt = SentenceTransformer(folder, backend="onnx", model_kwargs=options), prompt

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = batch["text"].tolist()
        vectors = self._model.encode(texts, batch_size=len(texts), prompt_name=self._prompt, show_progress_bar=False)
        return {"id": batch["id"], "embedding": vectors}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompt", help="name of the checkpoint's prompt, such as document")
    args = parser.parse_args(argv)
    process(Embedder, args, prompt=args.prompt)


if __name__ == "__main__":
    main()
