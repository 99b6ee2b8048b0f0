"""Answers of `optimum-cli lfm2 serve`, as clients of OpenAI's API see them."""

from __future__ import annotations

import json

from servers import QUESTION, STORY, alone, ask, post, streamed


def test_an_answer_streamed_and_not(client, loaded):
    gold = alone(loaded, QUESTION)
    answer = ask(client)
    assert answer.choices[0].message.content == gold == "3 plus 4 is 7."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(loaded.tokenizer(gold, add_special_tokens=False)["input_ids"]) + 1
    assert streamed(ask(client, stream=True)) == gold
    assert ask(client, STORY, max_tokens=3).choices[0].finish_reason == "length"


def test_the_other_endpoints(client, served, loaded):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert post(served[0], "/health", None, method="GET") == (200, '{"status":"ok"}')
    prompt = "Once upon a time"
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = loaded.model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    gold = loaded.tokenizer.decode(out, skip_special_tokens=True)
    fields = {"model": "tiny", "prompt": prompt, "max_tokens": 20}
    assert client.completions.create(**fields).choices[0].text == gold
    assert "".join(event.choices[0].text for event in client.completions.create(**fields, stream=True)) == gold
    biased = client.completions.create(**fields, logit_bias={str(int(out[0])): -100}).choices[0].text
    assert biased[:6] != gold[:6]
    said = client.responses.create(model="tiny", input=QUESTION[0]["content"], max_output_tokens=24)
    assert said.output_text == alone(loaded, QUESTION)
    events = client.responses.create(model="tiny", input=QUESTION[0]["content"], max_output_tokens=24, stream=True)
    assert [event.response.output_text for event in events if event.type == "response.completed"] == [said.output_text]


def test_settings_of_a_request(client, loaded):
    hot = {"temperature": 1.8, "top_p": 0.9, "seed": 7}
    gold = alone(loaded, STORY, seed=7, do_sample=True, temperature=1.8, top_p=0.9)
    assert ask(client, STORY, **hot).choices[0].message.content == gold != alone(loaded, STORY)
    assert streamed(ask(client, STORY, **hot, stream=True)) == gold
    assert ask(client, STORY, temperature=0).choices[0].message.content == alone(loaded, STORY)
    further = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.4}
    gold = alone(loaded, STORY, seed=3, do_sample=True, temperature=1.5, **further)
    assert ask(client, STORY, temperature=1.5, seed=3, extra_body=further).choices[0].message.content == gold


def test_a_stop_string_is_left_out(client, loaded):
    gold = alone(loaded, QUESTION)
    for stop in (" is 7", [" is", "nowhere"], "us 4"):
        cut = gold[: min(place for one in ([stop] if isinstance(stop, str) else stop) if (place := gold.find(one)) > 0)]
        assert ask(client, stop=stop).choices[0].message.content == cut
        assert streamed(ask(client, stop=stop, stream=True)) == cut
    assert streamed(ask(client, stop="7. No", stream=True)) == gold  # begun and not completed


def test_beams_run_alone(client, loaded):
    settings = {"num_beams": 3, "do_sample": False}
    fields = {"extra_body": {"generation_config": json.dumps(settings)}, "max_tokens": 12}
    answer = ask(client, extra_body={"generation_config": settings})  # what it does not name is the model's: its end
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("3 plus 4 is 7.", "stop")
    gold = alone(loaded, STORY, new=12, num_beams=3)
    assert ask(client, STORY, **fields).choices[0].message.content == gold
    assert streamed(ask(client, STORY, stream=True, **fields)) == gold
