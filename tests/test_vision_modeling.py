"""Generation with pictures: the tokens of transformers on the unpadded row, run alone."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from pictures import IMAGE, gold_vl_model, gold_vl_tokens, joined, pictures, row
from transformers import AutoTokenizer, GenerationConfig

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration, compat
from optimum_lfm2.errors import Lfm2Error


NEW = 32
# The text of each row, and the tiles of each of its pictures. The last picture of the third row has two tiles.
ROWS = [
    ("Tell me about this: #", [[(2, 3)]]),
    ("What is 3 plus 4?", []),
    ("# Ben put the silver key next to the well. Where is the silver key? #", [[(1, 1)], [(3, 2), (1, 2)]]),
    ("# What comes after Tuesday?", [[(5, 4)]]),
]


@pytest.fixture(scope="module")
def model(vl_folder):
    return ORTLfm2VlForConditionalGeneration.from_pretrained(vl_folder)


@pytest.fixture(scope="module")
def vl_gold(vl_checkpoint):
    return gold_vl_model(vl_checkpoint)


@pytest.fixture(scope="module")
def rows(vl_gold):
    """For each row its ids, its pictures (None without) and the gold."""
    found = []
    for i, (text, tiles) in enumerate(ROWS):
        ids = row(text, tiles)
        shown = pictures([tile for picture in tiles for tile in picture], vl_gold.config, seed=i) if tiles else None
        found.append((ids, shown, gold_vl_tokens(vl_gold, ids, shown, NEW)))
    return found


def batch(rows, side: str) -> dict[str, torch.Tensor]:
    """What the processor gives for these rows, padded on a side."""
    longest = max(len(ids) for ids, *_ in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, (own, *_) in enumerate(rows):
        place = slice(longest - len(own), None) if side == "left" else slice(len(own))
        ids[i, place], mask[i, place] = own, 1
    shown = [tiles for _, tiles, _ in rows if tiles is not None]
    return {"input_ids": ids, "attention_mask": mask, **(joined(shown) if shown else {})}


def new_tokens(model, inputs, **options) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_a_batch_get_the_tokens_that_they_get_alone(side, use_cache, model, rows):
    assert new_tokens(model, batch(rows, side), use_cache=use_cache) == [gold for *_, gold in rows]


def test_a_batch_goes_on_where_a_row_had_ended_before_another(model, vl_gold, rows):
    """The padding behind a row's end is in no state, so every row goes on as alone."""
    pair, new = [rows[0], rows[3]], 10
    first, other = (gold[:new] for *_, gold in pair)
    end = next(token for token in first[2:] if token not in other)
    first = first[: first.index(end) + 1]
    assert len(first) < new
    inputs = batch(pair, "left")
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    out = model.generate(**inputs, **settings, eos_token_id=end)
    answers = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert answers == [first + [0] * (new - len(first)), other]
    more = torch.tensor([[30], [30]])
    written = torch.tensor([[1] * len(first) + [0] * (new - len(first)), [1] * new])
    chats = [torch.cat([ids, torch.tensor(own), more[0]]) for (ids, *_), own in zip(pair, (first, other), strict=True)]
    golds = [gold_vl_tokens(vl_gold, chat, shown, new) for chat, (_, shown, _) in zip(chats, pair, strict=True)]
    shown = torch.cat([torch.ones_like(written[:, 1:]), written[:, -1:]], dim=1)  # over what the cache has read
    for behind in (written, shown):
        mask = torch.cat([inputs["attention_mask"], behind, torch.ones_like(more)], dim=1)
        again = {compat.CACHE: copy.deepcopy(out[compat.CACHE]), "attention_mask": mask, **settings}
        ids = torch.cat([out.sequences, more], dim=1)
        found = model.generate(ids, **again, eos_token_id=None).sequences
        assert found[:, ids.shape[1] :].tolist() == golds


def test_the_text_depends_on_the_picture(vl_gold, rows):
    ids, _, gold = rows[0]
    others = [gold_vl_tokens(vl_gold, ids, pictures([(2, 3)], vl_gold.config, seed), NEW) for seed in (7, 8)]
    assert gold not in others
    assert others[0] != others[1]


def test_a_long_prompt_runs_in_chunks_with_its_pictures(model, vl_gold):
    tiles = [[(8, 9)], [(16, 16), (12, 16)]]
    shown = pictures([tile for picture in tiles for tile in picture], vl_gold.config, seed=3)
    ids = row("# and # Tell me a story.", tiles)
    assert len(ids) > 512
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **shown}
    gold = gold_vl_tokens(vl_gold, ids, shown, NEW)
    assert new_tokens(model, inputs) == [gold]
    assert new_tokens(model, inputs, prefill_chunk_size=7) == [gold]


def test_a_streamer_gets_the_tokens_as_they_come(model, rows):
    class Streamer:
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard += value.flatten().tolist()

        def end(self):
            self.heard.append("end")

    (ids, _, gold), streamer = rows[0], Streamer()
    new_tokens(model, batch(rows[:1], "left"), streamer=streamer)
    assert streamer.heard == [*ids.tolist(), *gold, "end"]


def test_text_alone_has_candidates_from_the_prompt(model, rows):
    *_, gold = rows[1]
    assert new_tokens(model, batch(rows[1:2], "left"), prompt_lookup_num_tokens=4) == [gold]


def test_sampling_is_transformers(model, vl_gold, rows):
    inputs = batch(rows[:1], "left")
    texts = []
    for one in (model, vl_gold):
        torch.manual_seed(5)
        texts.append(new_tokens(one, inputs, do_sample=True, temperature=2.0, num_return_sequences=2))
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_beams_of_a_batch_are_those_of_each_row_alone(model, rows):
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    alone = [tokens for one in rows for tokens in new_tokens(model, batch([one], "left"), **options)]
    assert new_tokens(model, batch(rows, "left"), **options) == alone
    assert alone[::2] != [gold for *_, gold in rows]


@pytest.mark.skipif(not compat.TRANSFORMERS_5, reason="beam search of transformers 4.57 fails on LFM2's cache")
def test_beams_are_transformers(model, vl_gold, rows):
    options = {"num_beams": 3, "length_penalty": 0.0}
    for one in rows[:2]:
        assert new_tokens(model, batch([one], "left"), **options) == new_tokens(
            vl_gold, batch([one], "left"), **options
        )


@pytest.mark.parametrize("whole", [True, False], ids=["all pictures", "the new picture"])
def test_a_chat_goes_on_with_another_picture(whole, model, vl_gold, rows):
    ids, shown, _ = rows[0]
    first = model.generate(
        **batch(rows[:1], "left"), max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    ids = torch.cat([first.sequences[0], row("And this? #", [[(2, 2)]])])
    new = pictures([(2, 2)], vl_gold.config, seed=9)
    both = joined([shown, new])
    gold = gold_vl_tokens(vl_gold, ids, both, NEW)
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **(both if whole else new)}
    cache = getattr(first, compat.CACHE)
    # Without a picture a turn goes on too: those of earlier turns are in the cache.
    text = torch.cat([first.sequences[0], row("What is 3 plus 4?")])
    plain = {"input_ids": text[None], "attention_mask": torch.ones_like(text)[None]}
    assert new_tokens(model, plain, past_key_values=copy.deepcopy(cache)) == [gold_vl_tokens(vl_gold, text, shown, NEW)]
    assert new_tokens(model, inputs, past_key_values=cache) == [gold]


def test_logits_and_features_are_transformers(model, vl_gold, rows):
    inputs = batch(rows[2:3], "left")
    with torch.no_grad():
        gold = vl_gold(**inputs).logits
        features = compat.picture_features(vl_gold, rows[2][1])
    torch.testing.assert_close(model(**inputs).logits, gold, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model.get_image_features(**rows[2][1]), features, rtol=1e-4, atol=1e-4)


def test_a_saved_model_loads_again(model, rows, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lfm2_vl"
    options, inputs = onnxruntime.SessionOptions(), batch(rows[:1], "left")
    options.intra_op_num_threads = 2
    again = ORTLfm2VlForConditionalGeneration.from_pretrained(
        tmp_path, session_options=options, generation_config=GenerationConfig(top_k=3)
    )
    assert again.session.get_session_options().intra_op_num_threads == 2
    assert again.generation_config.top_k == 3
    assert again.to("cpu") is again
    with pytest.raises(Lfm2Error, match="keeps its dtype"):
        ORTLfm2VlForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    assert new_tokens(again, inputs, max_new_tokens=4)[0] == rows[0][2][:4]
    ids = inputs.pop("input_ids")  # by position, as transformers takes them too
    out = again.generate(ids, **inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out[0, ids.shape[1] :].tolist() == rows[0][2][:4]


def test_exported_while_it_loads(vl_checkpoint, rows):
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(vl_checkpoint, export=True)
    assert new_tokens(model, batch(rows[:1], "left"), max_new_tokens=4)[0] == rows[0][2][:4]


def test_pictures_that_do_not_fit_are_one_line(model, rows):
    inputs = batch(rows[:1], "left")
    two = inputs | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([[IMAGE]])], 1)}
    two["attention_mask"] = torch.ones_like(two["input_ids"])
    wrong = {
        "has 7 picture tokens, and the pictures fill 6": two,
        "there are no pictures": {name: inputs[name] for name in ("input_ids", "attention_mask")},
        "spatial_shapes is missing": {name: inputs[name] for name in inputs if name != "spatial_shapes"},
        "input_ids has the shape": inputs | {"input_ids": inputs["input_ids"][0]},
        "do not fit": inputs | {"pixel_attention_mask": inputs["pixel_attention_mask"][:, 1:]},
        "has to be float": inputs | {"pixel_values": (inputs["pixel_values"] * 255).to(torch.uint8)},
        "pixel_values is missing, or no tensor": inputs | {"pixel_values": inputs["pixel_values"].tolist()},
        r"pixel_values \(\d+, 48\)": inputs | {"pixel_values": inputs["pixel_values"][0]},
        r"give \(tiles, patches, 48\)": inputs | {"pixel_values": inputs["pixel_values"][:, :, 1:]},
        "more patches": inputs | {"spatial_shapes": inputs["spatial_shapes"] * 2},
        "does not take pictures yet": inputs | {"prompt_lookup_num_tokens": 4},
    }
    for said, given in wrong.items():
        with pytest.raises(Lfm2Error, match=said) as error:
            model.generate(**given, max_new_tokens=2)
        assert "\n" not in str(error.value)


def test_folders_that_do_not_fit_are_one_line(vl_folder, vl_checkpoint, tmp_path, exported, checkpoint):
    def without(*names: str) -> Path:
        return shutil.copytree(vl_folder, tmp_path / "-".join(names), ignore=shutil.ignore_patterns(*names))

    def with_config(name: str, text: str) -> Path:
        folder = shutil.copytree(vl_folder, tmp_path / name)
        (folder / "config.json").write_text(text)
        return folder

    config = json.loads((vl_folder / "config.json").read_text())
    wrong = json.dumps(config | {"text_config": config["text_config"] | {"hidden_size": "wide"}})
    ours = ORTLfm2VlForConditionalGeneration
    for load, where, said in [
        (ours, without("vision_encoder.onnx"), "has no vision_encoder.onnx"),
        (ours, without("embed_tokens.onnx_data"), "cannot load .*embed_tokens.onnx"),
        (ours, without("config.json"), "has no config.json"),
        (ours, with_config("broken", "{"), "config.json"),
        (ours, with_config("wrong", wrong), "hidden_size in the text_config"),
        (ours, exported("trained"), "text alone"),
        (ours, checkpoint("trained"), "text alone"),
        (ORTModelForCausalLM, vl_folder, "takes pictures too"),
        (ORTModelForCausalLM, vl_checkpoint, "takes pictures too"),
    ]:
        with pytest.raises(Lfm2Error, match=said) as error:
            load.from_pretrained(where)
        assert "\n" not in str(error.value)


def test_a_file_may_be_named_with_its_folder(vl_folder):
    own = ORTLfm2VlForConditionalGeneration.from_pretrained(vl_folder, file_name="onnx/decoder_model_merged.onnx")
    assert Path(own.path).name == "decoder_model_merged.onnx"


def test_the_tokenizer_of_an_export_loads(vl_folder, vl_checkpoint):
    own, original = (AutoTokenizer.from_pretrained(path) for path in (vl_folder, vl_checkpoint))
    assert own("Once upon a time").input_ids == original("Once upon a time").input_ids
