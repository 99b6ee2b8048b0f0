"""A second graph of the decoder, for onnxruntime-genai. It gives the logits of each row's last token alone.

onnxruntime-genai (0.18) reads no others. Yet it lets a graph compute the logits of every token of a prompt, unless the
graph declares that it has those of one (https://github.com/microsoft/onnxruntime-genai/pull/1995). So the graph for
Optimum and Transformers.js would cost time there, and 262 KB a token of the prompt with a vocabulary of 65,536.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimum_lfm2.caches import LOGITS_TO_KEEP
from optimum_lfm2.file_names import GENAI_DECODER
from optimum_lfm2.graph.editing import constant


MASK = "attention_mask"


def write_decoder(decoder: Path, place: Path) -> None:
    """Write the second graph of a decoder as `GENAI_DECODER`. Its weights are those of the decoder's own file.

    Args:
        decoder: the decoder's file.
        place: the folder in which the decoder's file lies or will lie.
    """
    model = ir.load(decoder)
    keep_last_logits(model.graph)
    ir.save(model, place / GENAI_DECODER)


def keep_last_logits(graph: ir.Graph) -> None:
    """Replace the input `num_logits_to_keep`: logits are those of each row's last unmasked token.

    The graph takes as many last tokens as that input says, by a `Slice` of hidden states (batch_size, sequence_length,
    hidden_size). Instead of these it takes one token a row, which is not the last column where padding follows.
    """
    count = next(value for value in graph.inputs if value.name == LOGITS_TO_KEEP)
    starts = [node.outputs[0] for reshape, _ in count.uses() for node, _ in reshape.outputs[0].uses()]
    slices = [node for start in starts for node, _ in start.uses()]
    last = _last_token(graph)
    for node in slices:
        taken = ir.node("GatherND", [node.inputs[0], last], {"batch_dims": 1})
        graph.insert_before(node, taken)
        ir.convenience.replace_all_uses_with(node.outputs[0], taken.outputs[0])
    for value in (*(node.outputs[0] for node in slices), *starts, *(node.outputs[0] for node, _ in count.uses())):
        graph.remove(value.producer(), safe=True)
    graph.inputs.remove(count)
    graph.initializers.pop(LOGITS_TO_KEEP, None)
    logits = graph.outputs[0]
    batch, _, vocabulary = logits.shape
    logits.shape = ir.Shape([batch, 1, vocabulary])


def _last_token(graph: ir.Graph) -> ir.Value:
    """Emit the index of each row's last unmasked token, (batch_size, 1, 1), as `GatherND` takes it."""
    tokens, mask = graph.inputs[0], next(value for value in graph.inputs if value.name == MASK)
    tape = ir.tape.Tape()
    length = tape.op("Shape", [tokens], {"start": 1, "end": 2})
    end = constant(tape, [np.iinfo(np.int64).max])
    new = tape.op("Slice", [mask, tape.op("Neg", [length]), end, constant(tape, [1])])
    columns = tape.op("Range", [constant(tape, 0), tape.op("Squeeze", [length]), constant(tape, 1)])
    last = tape.op("ReduceMax", [tape.op("Mul", [new, columns]), constant(tape, [1])], {"keepdims": 1})
    index = tape.op("Unsqueeze", [last, constant(tape, [2])])
    graph.insert_before(graph[0], tape.nodes)
    return index
