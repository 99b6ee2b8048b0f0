"""Models with experts in Transformers.js in node."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import gold_tokens, prompts
from clients import NEW, PRECISIONS, case, up_to_end
from node import NEEDS_NODE
from test_node import ask, start


pytestmark = NEEDS_NODE

# In these files QMoE rounds activations to int8. onnxruntime can do so from 1.31 on, and Transformers.js 4.3 has 1.30.
NOT_WITH_EXPERTS = ("q8", "q4")


def test_experts(experts_folder, gold_model, plain):
    """Each row of a padded batch equals transformers alone, and every precision gives the logits of Python."""
    lengths = (9, 1, 30)
    rows = [row.tolist() for row in prompts(list(lengths))]
    golds = [up_to_end(gold_tokens(gold_model("moe"), torch.tensor(row), NEW)) for row in rows]
    ids = rows[2] + golds[2]
    asked = {"dtype": "fp32", "max_new_tokens": NEW}
    cases = {("row", i): case("continue", rows=[row], **asked) for i, row in enumerate(rows)}
    cases["batch"] = case("continue", rows=rows, **asked)
    dtypes = [dtype for dtype in PRECISIONS if dtype not in NOT_WITH_EXPERTS]
    answers = ask(experts_folder, cases | {dtype: case("logits", dtype=dtype, ids=ids) for dtype in dtypes})
    assert [answers["row", i] for i in range(len(rows))] == [[gold] for gold in golds]
    assert [up_to_end(row) for row in answers["batch"]] == golds
    for dtype in dtypes:
        precision = PRECISIONS[dtype]
        expected = plain(experts_folder / precision.file).logits(ids)
        np.testing.assert_allclose(np.array(answers[dtype]), expected, atol=precision.rounded, rtol=0)


@pytest.mark.parametrize("dtype", NOT_WITH_EXPERTS)
def test_what_the_readme_says_it_cannot_do(experts_folder, dtype):
    done = start(experts_folder, [case("logits", dtype=dtype, ids=[9])])
    assert "Unrecognized attribute: accuracy_level for operator QMoE" in done.stderr
