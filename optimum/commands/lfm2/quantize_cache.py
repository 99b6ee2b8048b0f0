"""`optimum-cli lfm2 quantize-cache`.

Every start of `optimum-cli` imports this, so the top imports nothing heavy.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


DESCRIPTION = """\
Write a second graph, NAME_kv8.onnx, beside the exported NAME.onnx. Both share the same weights. The KV cache of the
second graph holds 8 bits a value, that of the first 16 or 32. It takes less memory, decodes faster after thousands of
tokens, and prefills long prompts more slowly. The scales are set on one half of the text and tested on the other.
It needs onnxruntime 1.27 or later.
Transformers.js cannot run it, since its caches hold floats alone.
"""


EPILOG = """\
Load the graph in Python, from the folder that has config.json (subfolder="onnx" where the graph lies below it):
  from optimum_lfm2 import ORTLfm2ForCausalLM
  model = ORTLfm2ForCausalLM.from_pretrained("OUT", file_name="model_kv8.onnx")
"""


class QuantizeCacheCommand(BaseOptimumCLICommand):
    """Writes a second graph whose KV cache holds 8 bits a value."""

    COMMAND = CommandInfo(name="quantize-cache", help="Keep the keys and values of an export in 8 bits.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description, parser.epilog = DESCRIPTION, EPILOG
        parser.add_argument("model", help="the exported folder, or one .onnx file of it")
        parser.add_argument("--text", required=True, help="a text file in UTF-8, like what the model will read")
        parser.add_argument("--chunks", type=int, default=32, help="how many chunks to read at most (default: 32)")
        parser.add_argument("--length", type=int, default=512, help="tokens of a chunk (default: 512)")

    def run(self) -> None:
        from optimum_lfm2.command import quiet, reported
        from optimum_lfm2.quality.quantize_cache import quantize_cache
        from optimum_lfm2.report import loading_file

        args = self.args
        with reported(), quiet():
            source, target, quality = quantize_cache(args.model, args.text, args.chunks, args.length)
        print(
            f"{target}: KL divergence from {source.name} {quality.kl_divergence:.2g}, same top token "
            f"{quality.top1_agreement:.2%} of {quality.tokens}; the weights stay those of {source.name}"
        )
        print(f"Load it in Python:\n{loading_file('text-generation', target)}")
