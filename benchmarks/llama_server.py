"""llama.cpp's server over HTTP: `python -m benchmarks.llama_server CHECKPOINT FILE --port 8080`.

It is that of the package xllamacpp. The file is written from the checkpoint, with its tokenizer, if it is not there.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.bench import say
from benchmarks.gguf_files import MIXES, ggml_quantiser, tokenizer_of, write_gguf


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path)
    add("file", type=Path)
    add("--port", type=int, required=True)
    add("--mix", choices=MIXES, default="Q4_0", help="of a file that is written")
    add("--threads", type=int, default=2)
    add("--rows", type=int, default=8, help="requests at once")
    add("--tokens", type=int, default=32768, help="of all rows together")
    args = parser.parse_args(argv)

    try:
        import xllamacpp
    except ImportError:
        sys.exit("llama.cpp is not installed: pip install xllamacpp")
    if not args.file.exists():
        say(f"writing {args.file}")
        args.file.parent.mkdir(parents=True, exist_ok=True)
        vocabulary = tokenizer_of(args.checkpoint)
        write_gguf(args.checkpoint, args.file, MIXES[args.mix], ggml_quantiser(), vocabulary=vocabulary)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = str(args.file), args.port
    settings.n_parallel, settings.n_ctx = args.rows, args.tokens
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(settings)
    say(f"llama.cpp listens at {server.listening_address}")
    signal.pause()


if __name__ == "__main__":
    main()
