"""`optimum-cli lfm2 quantize-cache`. Imported at every start of `optimum-cli`: nothing heavy at the top."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


DESCRIPTION = """\
Write a second graph beside an exported one, NAME_kv8.onnx beside NAME.onnx, over the same weights. Its cache of keys
and values holds 8 bits a value where the other holds 16 or 32: less memory, and faster decoding after thousands of
tokens; long prompts are read slower. The scales are measured on a text, of which a half tells what they cost.
Load it from that folder with file_name="NAME_kv8.onnx". It takes onnxruntime 1.27 or later; Transformers.js, whose
caches are floats alone, cannot run it.
"""


class QuantizeCacheCommand(BaseOptimumCLICommand):
    """Keys and values in 8 bits."""

    COMMAND = CommandInfo(name="quantize-cache", help="Keep the keys and values of an export in 8 bits.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = DESCRIPTION
        parser.add_argument("model", help="the exported folder, or one .onnx file of it")
        parser.add_argument("--text", required=True, help="a text file in UTF-8, like what the model will read")
        parser.add_argument("--chunks", type=int, default=32, help="how many chunks to read at most (default: 32)")
        parser.add_argument("--length", type=int, default=512, help="tokens of a chunk (default: 512)")

    def run(self) -> None:
        from optimum_lfm2.export.command import quiet, reported
        from optimum_lfm2.quality.quantize_cache import quantize_cache

        args = self.args
        with reported(), quiet():
            source, target, quality = quantize_cache(args.model, args.text, args.chunks, args.length)
        print(
            f"{target}: KL divergence from {source.name} {quality.kl_divergence:.2g}, same top token "
            f"{quality.top1_agreement:.2%} of {quality.tokens}"
        )
