"""`optimum-cli export lfm2` writes one folder for every runtime.

Every start of `optimum-cli` imports this. So the top imports nothing heavy, and `optimum_lfm2` is heavy.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from optimum.commands.lfm2.gguf_options import add_gguf_options, names_gguf


DESCRIPTION = """\
Write a folder for the Hub. Optimum, ONNX Runtime GenAI and Transformers.js run it as it is.

  OUT/config.json, tokenizer.json, chat_template.jinja, ...
  OUT/genai_config.json              for ONNX Runtime GenAI: og.Model("OUT")
  OUT/README.md                      a model card: how to run it, and what each precision costs
  OUT/onnx/model.onnx                fp32   computes the same as transformers; the largest
  OUT/onnx/model_fp16.onnx           fp16   for GPUs
  OUT/onnx/model_quantized.onnx      q8     8-bit weights, next to indistinguishable from fp32
  OUT/onnx/model_q4.onnx             q4     4-bit weights: the fastest on a CPU
  OUT/onnx/model_q4f16.onnx          q4f16  4-bit weights, computed in fp16: for WebGPU
  OUT/onnx/model_q4s.onnx            q4s    embedding and head in 4 bits too: smaller than q4, and loses twice as much

All but q4s are written unless --precisions chooses. Of an encoder, 4 bits are written only where --precisions asks for
them and --text shows that its vectors stay near.

Of a model that takes pictures, decoder_model_merged, embed_tokens and vision_encoder stand in the place of model. Its
vision encoder has 8 bits in q4, q4s and q4f16.

Every file is run and compared with transformers before it is kept."""

EPILOG = """\
examples:
  optimum-cli export lfm2 --model LiquidAI/LFM2-350M OUT --precisions fp32 q4 q4f16
  optimum-cli export lfm2 --model my-fine-tune OUT --text some.txt     # measures the quality for the card
  optimum-cli export lfm2 --model my-fine-tune OUT --precisions q8     # adds q8, leaves the others

At its end it prints the files, the largest difference that the check of each found, and how to load and upload them:
  hf upload YOU/YOUR-MODEL OUT

docs: README.md and docs/ of optimum-lfm2"""

# Here once more, since a command's options import nothing heavy. A test compares them with the package's own.
PRECISIONS = ("fp32", "fp16", "q8", "q4", "q4s", "q4f16")


class ExportLfm2Command(BaseOptimumCLICommand):
    """Writes a checkpoint in several precisions, with the configuration files of every runtime."""

    COMMAND = CommandInfo(
        name="lfm2", help="Export an LFM2 checkpoint in several precisions to a folder that every runtime reads."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description, parser.epilog = DESCRIPTION, EPILOG
        parser.add_argument(
            "-m", "--model", required=True, help="the checkpoint's folder or GGUF file, or its id on the Hub"
        )
        # Optional for the parser alone, since `--precisions q4 OUT` takes OUT for a precision (see `settle_output`).
        parser.add_argument(
            "output",
            type=Path,
            nargs="?",
            metavar="OUT",
            help="the folder to write, before or after the options; precisions that it has already stay",
        )
        parser.add_argument(
            "--precisions",
            nargs="+",
            metavar="PRECISION",
            help=f"which files to write, of {' '.join(PRECISIONS)} (default: fp32 fp16 q8 q4 q4f16, of an encoder fp32 "
            "fp16 q8)",
        )
        parser.add_argument(
            "--text",
            type=Path,
            help="a text file in UTF-8: measure on it how far each precision is from the checkpoint",
        )
        parser.add_argument("--chunks", type=int, default=64, help="chunks of --text to read at most (default: 64)")
        parser.add_argument("--length", type=int, default=512, help="tokens of a chunk (default: 512)")
        parser.add_argument(
            "--cache-names",
            default="hub",
            metavar="CONVENTION",
            help="names of the convolution states: hub (past_conv.0, which Transformers.js reads; the default) or "
            "genai (past.0.conv, as onnxruntime-genai's own builder writes)",
        )
        parser.add_argument(
            "--atol", type=float, help="the difference from transformers to accept (default: by precision)"
        )
        parser.add_argument("--repo-id", help="what the card's examples load, such as YOU/YOUR-MODEL (default: OUT)")
        parser.add_argument(
            "--base-model", help="the checkpoint's id on the Hub, for the card, where --model is a folder"
        )
        parser.add_argument("--license", help="for the card (default: what the checkpoint's card says)")
        parser.add_argument("--cache_dir", help="where downloads from the Hub are kept")
        add_gguf_options(parser)
        parser.usage = parser.format_usage().removeprefix("usage: ").replace("[OUT]", "OUT").rstrip()

    def run(self) -> None:
        from optimum.commands.lfm2.export_onnx import fail, read_config

        try:
            settle_output(self.args)
            config = None if names_gguf(self.args) else read_config(self.args)
        except ValueError as error:
            fail(error)
        from optimum_lfm2.publish.command import run_publish, run_publish_gguf

        if config is None:
            run_publish_gguf(self.args)
        else:
            run_publish(self.args, config)


def settle_output(args: Namespace) -> None:
    """Take the last of `--precisions` for the output where it is no precision, and none is given elsewhere.

    Raises:
        ValueError: there is no output.
    """
    if args.output is not None:
        return
    if not args.precisions or args.precisions[-1] in PRECISIONS:
        raise ValueError(
            "OUT is missing: which folder shall be written? Name it last, such as --precisions q4 ./lfm2_hub."
        )
    *args.precisions, output = args.precisions
    args.output = Path(output)
    if not args.precisions:
        raise ValueError(f"--precisions names none before {output}. Choose among {', '.join(PRECISIONS)}.")


def register() -> list[tuple[type, type | None]]:
    """Return the command, with `optimum-cli export` as its parent."""
    return [(ExportLfm2Command, ExportCommand)]
