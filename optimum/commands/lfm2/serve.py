"""`optimum-cli lfm2 serve`. Every start of `optimum-cli` imports this, so the top imports nothing heavy."""

from __future__ import annotations

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


DESCRIPTION = """\
Serve exported models to clients of the OpenAI API: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models and
/health. Requests share calls, and in float each gets the text that it gets alone. It is transformers' own server, and
needs transformers 5.24 or later, and: pip install fastapi uvicorn openai pydantic llguidance"""

EPILOG = """\
examples:
  optimum-cli lfm2 serve lfm2_onnx/
  optimum-cli lfm2 serve small=lfm2_350m/ large=lfm2_1b/ --host 0.0.0.0 --api-key SECRET

  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is 3 plus 4?"}]}'"""


class ServeCommand(BaseOptimumCLICommand):
    """Serves exported models to clients of the OpenAI API."""

    COMMAND = CommandInfo(name="serve", help="Serve exported models to clients of the OpenAI API.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description, parser.epilog = DESCRIPTION, EPILOG
        parser.add_argument("models", nargs="+", metavar="[NAME=]FOLDER", help="an exported folder, and its name")
        parser.add_argument("--file-name", help="the file to load where a folder has several, such as model_q4.onnx")
        parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine)")
        parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
        parser.add_argument("--api-key", help="what clients have to know (default: LFM2_API_KEY, or none)")
        rows = "requests that run together, for each model (default: 16)"
        parser.add_argument("--max-rows", type=int, default=16, metavar="N", help=rows)
        tokens = "rows times the tokens of the longest request, prompt and answer (default: 32768)"
        parser.add_argument("--max-tokens", type=int, default=32768, metavar="N", help=tokens)
        queue = "requests that wait; further ones get 503 (default: 256)"
        parser.add_argument("--max-queue", type=int, default=256, metavar="N", help=queue)
        memory = "for what was read before, so that a chat goes on from there (default: 512)"
        parser.add_argument("--cache-memory", type=int, default=512, metavar="MB", help=memory)
        parser.add_argument("--max-prompt", type=int, metavar="N", help="tokens of a prompt (default: the model's)")
        parser.add_argument(
            "--max-new-tokens", type=int, default=4096, metavar="N", help="of an answer (default: 4096)"
        )
        parser.add_argument("--max-body", type=int, default=16, metavar="MB", help="of a request (default: 16)")

    def run(self) -> None:
        from optimum_lfm2.command import quiet, reported
        from optimum_lfm2.serving.serve import check_server, serve

        args = self.args
        with reported(), quiet():
            check_server()
            serve(args, args.api_key or os.environ.get("LFM2_API_KEY"))
