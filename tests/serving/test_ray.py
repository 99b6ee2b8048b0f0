"""The examples of Ray, on a local one of two workers, with the trained model. They give what each text gives alone."""

from __future__ import annotations

import http.client
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch

from optimum_lfm2.compat import TRANSFORMERS_5


ray = pytest.importorskip(
    "ray", reason="ray is not among what CI installs: pip install 'ray[serve,data]' runs these tests"
)
if not TRANSFORMERS_5:
    pytest.skip("the server is transformers 5.24's", allow_module_level=True)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "ray"
TEXTS = [
    "What is 3 plus 4?",
    "Where do bees live?",
    "Tell me a story about a fox.",
    "What is 2 plus 2?",
    "Hello.",
    "Who?",
]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two workers of one core each, and two cores for Ray's own."""
    sys.path.insert(0, str(EXAMPLES))
    paths = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=paths)
    yield
    ray.shutdown()
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def table(tmp_path):
    """`table(first, last)` adds a file with these texts to the source, and returns the source's folder."""
    from pyarrow import Table, parquet

    def table(first: int, last: int) -> Path:
        (tmp_path / "source").mkdir(exist_ok=True)
        rows = [{"id": i, "text": TEXTS[i], "other": "x"} for i in range(first, last)]
        parquet.write_table(Table.from_pylist(rows), tmp_path / "source" / f"{first}.parquet")
        return tmp_path / "source"

    return table


def results(out: Path) -> list[dict]:
    from pyarrow import parquet

    return sorted(
        (row for file in (out / "results").glob("*.parquet") for row in parquet.read_table(file).to_pylist()),
        key=lambda row: row["id"],
    )


OPTIONS = ["--actors", "2", "--cores", "1", "--batch", "2"]


def test_answers_go_on_where_they_were(table, loaded, folder, tmp_path):
    import generate
    from servers import alone

    golds = [alone(loaded, [{"role": "user", "content": text}], new=12) for text in TEXTS]
    out = tmp_path / "out"
    generate.main([str(folder), str(table(0, 4)), str(out), *OPTIONS, "--new", "12"])
    assert [row["answer"] for row in results(out)] == golds[:4]
    written = {file.name for file in (out / "results").iterdir()}
    generate.main([str(folder), str(table(4, 6)), str(out), *OPTIONS, "--new", "12"])
    assert [(row["id"], row["answer"]) for row in results(out)] == list(enumerate(golds)), "each once"
    assert written < {file.name for file in (out / "results").iterdir()}


def test_vectors(table, exported, tmp_path):
    import embed
    from sentence_transformers import SentenceTransformer

    model = exported("trained", task="feature-extraction")
    golds = SentenceTransformer(str(model), backend="onnx").encode(TEXTS, batch_size=1)
    out = tmp_path / "out"
    embed.main([str(model), str(table(0, 6)), str(out), *OPTIONS])
    found = results(out)
    assert [row["id"] for row in found] == list(range(len(TEXTS)))
    torch.testing.assert_close(
        torch.tensor([row["embedding"] for row in found]), torch.from_numpy(golds), atol=1e-4, rtol=0
    )


def test_a_chat_stays_with_its_replica(loaded, folder):
    from ray import serve
    from servers import QUESTION, alone

    from examples.ray.serve import Options, build

    # `serve run` reads its options by the type of this argument, which a text would hide.
    assert inspect.signature(build).parameters["options"].annotation is Options
    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    serve.run(build(Options(models=f"tiny={folder}", cores=1, least=2, most=2)))

    def ask(session: str) -> tuple[str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", 8765, timeout=120)
        body = json.dumps({"messages": QUESTION, "max_tokens": 24})
        headers = {"Content-Type": "application/json", "x-session-id": session}
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        said = json.loads(answer.read())
        return said["choices"][0]["message"]["content"], answer.headers["x-replica"]

    found = {session: {ask(session) for _ in range(3)} for session in "abcdefgh"}
    assert {text for answers in found.values() for text, _ in answers} == {alone(loaded, QUESTION)}
    assert all(len(answers) == 1 for answers in found.values()), "a session has one replica"
    assert len({replica for answers in found.values() for _, replica in answers}) == 2
    serve.shutdown()
