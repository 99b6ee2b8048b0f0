"""What `test_picture_chats.py` needs torchvision for: what the chat in the terminal says of pictures, and a server.

`python torchvision_python.py picture_chats_child.py EXPORT QUESTION NEW [serve]`: the current folder holds 0.png, 1.png
and broken.png, and it writes said.json there. Each session has one thread: threads that spin take the cores from other
workers.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import sys
import threading
from pathlib import Path

import onnxruntime
from optimum.commands.optimum_cli import main as optimum_cli


create = onnxruntime.SessionOptions.__init__


@functools.wraps(create)
def one_thread(self: onnxruntime.SessionOptions) -> None:
    create(self)
    self.intra_op_num_threads = 1


onnxruntime.SessionOptions.__init__ = one_thread


def chat(export: str, new: str, *lines: str) -> dict:
    """What is written to the terminal and as errors, for lines from a pipe."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["optimum-cli", "lfm2", "chat", export, "--max-new-tokens", new]
    sys.stdin = io.StringIO("\n".join(lines))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        optimum_cli()
    return {"out": out.getvalue(), "err": err.getvalue()}


def picture(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def serve(export: str, question: str, new: str) -> dict:
    """Requests to a server, and how often features of pictures were made."""
    from servers import openai, serving, streamed

    from optimum_lfm2.serving.folder import load_folder
    from optimum_lfm2.vision_modeling import VisionModel

    loaded, made = load_folder(Path(export)), []
    see = VisionModel.features_of
    VisionModel.features_of = lambda *args: (made.append(1), see(*args))[1]
    shown = [picture(Path(f"{i}.png").read_bytes()) for i in range(2)]
    with serving(loaded) as (address, *_):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)

        def turn(i: int) -> dict:
            return {"role": "user", "content": [shown[i], {"type": "text", "text": question}]}

        def ask(*messages: dict, **fields: object):
            return client.chat.completions.create(
                model="tiny", messages=list(messages), max_tokens=int(new), temperature=0, **fields
            )

        def answer(*messages: dict) -> str:
            return ask(*messages).choices[0].message.content

        def features(work) -> int:
            before = len(made)
            work()
            return len(made) - before

        said: dict[str, object] = {}
        counts = {"a picture": features(lambda: said.update(alone=answer(turn(0))))}
        chat = [turn(0), {"role": "assistant", "content": said["alone"]}]
        counts["the next turn"] = features(lambda: answer(*chat, {"role": "user", "content": question}))
        said["streamed"] = streamed(ask(turn(0), stream=True))
        counts["another"] = features(lambda: said.update(other=answer(turn(1))))
        said["features made"] = counts
        said["apart"] = [said["alone"], said["other"]] * 3
        together: dict[int, str] = {}
        threads = [threading.Thread(target=lambda i=i: together.update({i: answer(turn(i % 2))})) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        said["together"] = [together[i] for i in range(6)]
        said["second turn"] = answer(*chat, turn(1))
        parts = [
            {"type": "input_image", "image_url": shown[0]["image_url"]["url"]},
            {"type": "input_text", "text": question},
        ]
        said["responses"] = client.responses.create(
            model="tiny", input=[{"role": "user", "content": parts}], max_output_tokens=int(new), temperature=0
        ).output_text
        try:
            ask({"role": "user", "content": [picture(b"none"), {"type": "text", "text": question}]})
        except openai.BadRequestError as error:
            said["broken"] = error.body["message"]
    return said


def main(export: str, question: str, new: str, *further: str) -> None:
    turns = ["/picture broken.png", "/picture 0.png", question, "/picture 1.png", question]
    said = {"chat": chat(export, new, *turns, "/save chat.json")}
    if further:
        said |= serve(export, question, new)
    Path("said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
