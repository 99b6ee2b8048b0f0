"""`optimum-cli lfm2 chat`. Every start of `optimum-cli` imports this, so the top imports nothing heavy."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


DESCRIPTION = """\
Talk to an exported model. It keeps what it has read, so each turn reads its own tokens alone. Lines may also come
from a pipe: each is a message, and only the answers are printed.

  Ctrl-C          ends an answer, not the chat
  /reset          begin a new chat
  /save FILE      write the chat so far to a JSON file
  /picture FILE   show a picture with the next message (LFM2-VL, LFM3-VL)
  /help, /exit"""

EPILOG = """\
examples:
  optimum-cli lfm2 chat lfm2_onnx/
  optimum-cli lfm2 chat lfm2_hub/ --file-name model_q4.onnx --temperature 0.3 --min-p 0.15
  echo "What is 3 plus 4?" | optimum-cli lfm2 chat lfm2_onnx/"""

# What `generate` knows by the same names. Without one of these the model's own generation_config.json decides.
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class ChatCommand(BaseOptimumCLICommand):
    """Talks to an exported model in the terminal."""

    COMMAND = CommandInfo(name="chat", help="Talk to an exported model.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description, parser.epilog = DESCRIPTION, EPILOG
        parser.add_argument("model", help="the exported folder")
        parser.add_argument("--file-name", help="the file to load where the folder has several, such as model_q4.onnx")
        parser.add_argument("--system", metavar="TEXT", help="the system prompt")
        parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 1024)")
        own = "(default: the model's own)"
        parser.add_argument("--temperature", type=float, metavar="X", help=f"0 takes the likeliest token {own}")
        parser.add_argument("--top-k", type=int, metavar="N", help=f"sample from the N likeliest tokens {own}")
        parser.add_argument("--top-p", type=float, metavar="X", help=f"from the likeliest that sum to X {own}")
        parser.add_argument("--min-p", type=float, metavar="X", help=f"from those X times as likely as the first {own}")
        parser.add_argument("--repetition-penalty", type=float, metavar="X", help=f"above 1 repeats less {own}")
        parser.add_argument("--seed", type=int, metavar="N", help="the same answers again where tokens are sampled")

    def run(self) -> None:
        from optimum_lfm2.command import quiet, reported
        from optimum_lfm2.serving.chat import run_chat

        args = self.args
        settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
        with reported(), quiet():
            run_chat(args.model, args.file_name, args.system, settings, args.seed)
