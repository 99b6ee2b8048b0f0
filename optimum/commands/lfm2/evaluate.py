"""`optimum-cli lfm2 evaluate`. Every start of `optimum-cli` imports this, so the top imports nothing heavy."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class EvaluateCommand(BaseOptimumCLICommand):
    """Measures how far an export is from its checkpoint."""

    COMMAND = CommandInfo(name="evaluate", help="Compare an export with its checkpoint on a text.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", help="the exported folder, or one .onnx file of it")
        parser.add_argument("--reference", required=True, help="the checkpoint's folder, or another export")
        parser.add_argument("--text", required=True, help="a text file in UTF-8")
        parser.add_argument("--chunks", type=int, default=64, help="how many chunks to read at most (default: 64)")
        parser.add_argument("--length", type=int, default=512, help="tokens of a chunk (default: 512)")
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
        parser.add_argument(
            "--max-kld", type=float, metavar="X", help="exit with 1 if the mean KL divergence exceeds X"
        )

        parser.add_argument(
            "--min-cosine", type=float, metavar="X", help="for an encoder: exit with 1 if the mean cosine is below X"
        )

    def run(self) -> None:
        from optimum_lfm2.command import quiet, reported
        from optimum_lfm2.quality.evaluate import evaluate

        args = self.args
        with reported(), quiet():
            quality = evaluate(args.model, args.reference, args.text, args.chunks, args.length)
        print(json.dumps(quality.as_dict(), indent=2) if args.json else quality.table())
        with reported():
            self._judge(quality)

    def _judge(self, quality: Any) -> None:
        """Raise `Lfm2Error` where a figure is beyond what the options allow, or is not measured for this model."""
        from optimum_lfm2.errors import Lfm2Error

        least, most = self.args.min_cosine, self.args.max_kld
        if least is not None:
            cosine = getattr(quality, "cosine", None)
            if cosine is None:
                raise Lfm2Error("--min-cosine is for encoders. This model predicts tokens: use --max-kld.")
            if not cosine >= least:
                raise Lfm2Error(f"The mean cosine is {cosine:.6f}, below --min-cosine {least:g}.")
        if most is not None:
            divergence = getattr(quality, "kl_divergence", None)
            if divergence is None:
                raise Lfm2Error(
                    "--max-kld is for models that predict tokens. This one is an encoder: use --min-cosine."
                )
            if not divergence <= most:
                raise Lfm2Error(f"The mean KL divergence is {divergence:.3g}, above --max-kld {most:g}.")
