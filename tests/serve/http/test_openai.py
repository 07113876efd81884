"""The official client of OpenAI judges the server: what it reads is what ``turnout.generate`` makes."""

import asyncio
import json
import math

import openai
import pydantic
import pytest
import tokenizers
from serving import make_lm, serving, wait_for

from turnout import generate
from turnout.serve.engine import Token
from turnout.serve.http.made import completion_logprobs
from turnout.serve.http.spelling import Spelling

CHAT = [{"role": "user", "content": "line 3"}]
WRITTEN = "<user>line 3\n<assistant>"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def alone(served, ids, tokens: int, **settings):
    """What generate makes of a text."""
    settings = {"temperature": 0.0, "eos": 0, "tokenizer": served.tokenizer, **settings}
    made = generate(served.lm, [ids], tokens=tokens, **settings)
    return made.text_B[0], made


def opened(served, text: str) -> list[int]:
    return [0, *served.tokenizer.encode(text).ids]


def test_a_completion_is_what_generate_makes(served, client):
    for prompt in ("line 1", "the cat", "é 例え", ""):
        text, made = alone(served, opened(served, prompt), 24)
        found = client.completions.create(model="moe", prompt=prompt, max_tokens=24, temperature=0)
        assert found.choices[0].text == text
        assert found.usage.prompt_tokens == made.start
        assert found.usage.completion_tokens == int(made.length_B[0])
        assert found.choices[0].finish_reason == ("stop" if made.why_B[0] == "eos" else "length")


def test_several_prompts_and_tokens_in_one_request(served, client):
    prompts = ["line 1", "the dog", "line 1"]
    found = client.completions.create(model="moe", prompt=prompts, max_tokens=9, temperature=0, n=2)
    assert [choice.index for choice in found.choices] == list(range(6))
    wanted = [alone(served, opened(served, prompt), 9)[0] for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in found.choices] == wanted
    assert found.usage.prompt_tokens == sum(len(opened(served, prompt)) for prompt in prompts)
    ids = [[5, 6, 7], [8, 9]]
    found = client.completions.create(model="moe", prompt=ids, max_tokens=9, temperature=0)
    assert [choice.text for choice in found.choices] == [alone(served, one, 9)[0] for one in ids]


def test_a_chat_goes_through_the_template(served, client):
    text, _ = alone(served, served.tokenizer.encode(WRITTEN).ids, 20)
    found = client.chat.completions.create(model="moe", messages=CHAT, max_completion_tokens=20, temperature=0)
    assert (found.choices[0].message.role, found.choices[0].message.content) == ("assistant", text)
    parts = [{"role": "user", "content": [{"type": "text", "text": "line 3"}]}]
    assert client.chat.completions.create(model="moe", messages=parts, max_tokens=20, temperature=0).choices[
        0
    ].message.content == (text)


def test_a_chat_without_a_limit_goes_to_the_end_of_the_context(served, client):
    found = client.chat.completions.create(model="moe", messages=CHAT, temperature=0, extra_body={"ignore_eos": True})
    assert found.usage.total_tokens == 256
    assert found.choices[0].finish_reason == "length"


def test_a_stream_is_the_text_and_its_last_event_the_usage(served, client):
    text, _ = alone(served, served.tokenizer.encode(WRITTEN).ids, 40)
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="moe", messages=CHAT, max_tokens=40, temperature=0, stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason is not None
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens > 0
    plain = client.completions.create(model="moe", prompt="line 1", max_tokens=40, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in plain) == alone(served, opened(served, "line 1"), 40)[0]


def test_many_at_once_each_as_alone(served):
    prompts = [f"line {n}" for n in range(12)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="moe", prompt=prompt, max_tokens=16, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*map(one, prompts)))

    assert asyncio.run(ask()) == [alone(served, opened(served, prompt), 16)[0] for prompt in prompts]


def test_seeds_and_copies(served, client):
    def drawn(**settings):
        found = client.completions.create(model="moe", prompt="the", max_tokens=12, temperature=1.2, **settings)
        return [choice.text for choice in found.choices]

    three = drawn(n=3, seed=5)
    assert len(set(three)) == 3
    assert drawn(n=3, seed=5) == three
    assert drawn(seed=5) == three[:1] == [alone(served, opened(served, "the"), 12, temperature=1.2, seed=5)[0]]
    assert drawn(seed=6) != three[:1]
    assert drawn() != drawn()
    filtered = alone(served, opened(served, "the"), 12, temperature=1.2, seed=5, top_p=0.8, top_k=40, min_p=0.01)[0]
    assert drawn(seed=5, top_p=0.8, extra_body={"top_k": 40, "min_p": 0.01}) == [filtered]


def test_stops(served, client):
    whole, _ = alone(served, opened(served, "the cat"), 30)
    stop = whole[4:6]
    found = client.completions.create(model="moe", prompt="the cat", max_tokens=30, temperature=0, stop=[stop, "zzz"])
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    kept = {"include_stop_str_in_output": True}
    found = client.completions.create(
        model="moe", prompt="the cat", max_tokens=30, temperature=0, stop=stop, extra_body=kept
    )
    assert found.choices[0].text == whole[: whole.index(stop) + len(stop)]


def test_logprobs_of_completions(served, client):
    _, made = alone(served, opened(served, "the cat"), 8, logprobs=True, eos=None)
    found = client.completions.create(
        model="moe", prompt="the cat", max_tokens=8, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    ).choices[0]
    told = found.logprobs
    assert told.token_logprobs == pytest.approx(made.logprob_BN[0].tolist(), abs=1e-4)
    assert all(len(top) == 3 for top in told.top_logprobs)
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert max(top.values()) == top[token] == logprob  # the likeliest was taken
    assert told.text_offset == sorted(told.text_offset)
    chosen = client.completions.create(model="moe", prompt="the cat", max_tokens=8, temperature=0, logprobs=0)
    assert all(len(top) == 1 for top in chosen.choices[0].logprobs.top_logprobs)


def test_of_tokens_that_are_spelt_alike_the_likeliest_is_told():
    words = {"<unk>": 0, "▁": 1, "<0x20>": 2, "a": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], byte_fallback=True))
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    token = Token(3, "a", -1.5, ((1, -0.5), (3, -1.5), (2, -9.0)))
    told = completion_logprobs([token], Spelling(tokenizer), offset=0)
    assert told["top_logprobs"] == [{" ": -0.5, "a": -1.5}]


def test_logprobs_of_chats_whole_and_streamed(served, client):
    settings = {"model": "moe", "messages": CHAT, "max_tokens": 12, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**settings, top_logprobs=2).choices[0].logprobs.content
    assert whole
    for one in whole:
        assert len(one.top_logprobs) == 2
        assert one.logprob == one.top_logprobs[0].logprob <= 0
        assert one.token == bytes(one.bytes).decode(errors="replace") or one.token.startswith("bytes:")
    chunks = client.chat.completions.create(**settings, top_logprobs=2, stream=True)
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert streamed == whole
    share = sum(math.exp(one.logprob) for one in whole[0].top_logprobs)
    assert 0 < share <= 1.0001


def test_echo(served, client):
    found = client.completions.create(model="moe", prompt="the cat", max_tokens=5, temperature=0, echo=True, n=2)
    wanted = "the cat" + alone(served, opened(served, "the cat"), 5)[0]
    assert [choice.text for choice in found.choices] == [wanted] * 2
    chunks = list(
        client.completions.create(
            model="moe", prompt="the cat", max_tokens=5, temperature=0, echo=True, n=2, stream=True
        )
    )
    for index in (0, 1):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == wanted


class Line(pydantic.BaseModel):
    """What an answer must be."""

    model_config = pydantic.ConfigDict(extra="forbid")
    number: int
    kind: str = pydantic.Field(max_length=8)
    signs: list[bool] = pydantic.Field(max_length=3)


def test_an_answer_has_the_form_that_was_asked_for(client):
    for seed in range(5):
        found = client.chat.completions.parse(
            model="moe", messages=CHAT, response_format=Line, temperature=1.5, seed=seed, max_tokens=200
        )
        made = found.choices[0].message.parsed
        assert isinstance(made, Line), f"seed {seed}"
        assert found.choices[0].finish_reason == "stop"
    found = client.responses.parse(model="moe", input="line", text_format=Line, temperature=1.5, max_output_tokens=200)
    assert isinstance(found.output_parsed, Line)


def test_any_json_object(client):
    for seed in range(3):
        settings = {"model": "moe", "messages": CHAT, "temperature": 1.0, "seed": seed, "max_tokens": 230}
        found = client.chat.completions.create(**settings, response_format={"type": "json_object"}).choices[0]
        assert found.message.content.startswith("{")
        if found.finish_reason == "stop":
            assert isinstance(json.loads(found.message.content), dict), f"seed {seed}"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    found = client.chat.completions.create(model="moe", messages=CHAT, n=3, temperature=2, response_format=form)
    assert {choice.message.content for choice in found.choices} <= {'"a"', '"b"'}


def test_responses_whole_and_in_events(served, client):
    text, made = alone(served, served.tokenizer.encode(WRITTEN).ids, 15)
    found = client.responses.create(model="moe", input="line 3", max_output_tokens=15, temperature=0)
    assert found.output_text == text
    assert found.usage.output_tokens == int(made.length_B[0])
    told = [{"role": "user", "content": [{"type": "input_text", "text": "line 3"}]}]
    settings = {"model": "moe", "input": told, "max_output_tokens": 15, "temperature": 0}
    assert client.responses.create(**settings).output_text == text
    events = list(client.responses.create(**settings, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == text
    form = {"type": "json_schema", "name": "x", "schema": {"enum": ["a", "b"]}, "strict": True}
    with client.responses.stream(**settings, text={"format": form}) as stream:
        final = stream.get_final_response()
    assert final.output_text in ('"a"', '"b"')
    assert final.status == "completed"
    written = served.tokenizer.encode("<system>be\n" + WRITTEN).ids
    found = client.responses.create(
        model="moe",
        input="line 3",
        instructions="be",
        max_output_tokens=15,
        temperature=0,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    assert found.output_text == alone(served, written, 15)[0]
    assert len(found.output[0].content[0].logprobs[0].top_logprobs) == 2


def test_models(client):
    assert [model.id for model in client.models.list()] == ["moe"]
    assert client.models.retrieve("moe").id == "moe"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'moe'"):
        client.models.retrieve("mo")


@pytest.mark.parametrize(
    ("settings", "kind", "says", "param"),
    [
        ({"model": "MOE"}, openai.NotFoundError, "Did you mean 'moe'", "model"),
        ({"model": "mo"}, openai.NotFoundError, "Did you mean 'moe'", "model"),
        ({"max_tokens": 300}, openai.BadRequestError, "maximum context length is 256", "max_tokens"),
        ({"temperature": 3}, openai.BadRequestError, "from 0 to 2", "temperature"),
        ({"logit_bias": {"300": 1}}, openai.BadRequestError, "token ids from 0 to 299", "logit_bias"),
        ({"logit_bias": {"the": 1}}, openai.BadRequestError, "token ids from 0 to 299", "logit_bias"),
        ({"logit_bias": {"3": 101}}, openai.BadRequestError, "from -100 to 100", "logit_bias.3"),
        ({"presence_penalty": 2.5}, openai.BadRequestError, "from -2 to 2", "presence_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "no tools", "tools"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "write temperature", "temprature"),
        ({"messages": [{"role": "tool", "content": "a"}]}, openai.BadRequestError, "one of", "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            openai.BadRequestError,
            "text",
            None,
        ),
        ({"top_logprobs": 3}, openai.BadRequestError, "logprobs=true", "top_logprobs"),
    ],
)
def test_refusals_say_what_is_wrong(client, settings, kind, says, param):
    with pytest.raises(kind, match=says) as found:
        client.chat.completions.create(**{"model": "moe", "messages": CHAT, "max_tokens": 5, **settings})
    assert param is None or found.value.param == param
    assert found.value.type in ("invalid_request_error", "not_found_error")


def test_what_is_harmless_is_taken(client):
    client.chat.completions.create(
        model="moe",
        messages=CHAT,
        max_tokens=2,
        user="me",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        tools=[],
        parallel_tool_calls=True,
        presence_penalty=0.0,
        frequency_penalty=0,
        logit_bias={},
        temperature=0,
        top_p=0.5,
        seed=None,
    )


def test_penalties_and_bias_draw_what_generate_draws(served, client):
    for temperature, seed in ((0, None), (1.0, 5)):
        how = {"frequency_penalty": 1.5, "presence_penalty": -0.5, "temperature": temperature, "seed": seed}
        told = client.completions.create(
            model="moe", prompt="the cat", max_tokens=20, logprobs=0, logit_bias={"70": -100, "71": 3.5}, **how
        )
        ids = opened(served, "the cat")
        bias = {70: -100, 71: 3.5}
        made = generate(served.lm, [ids], tokens=20, eos=[0], tokenizer=served.tokenizer, logit_bias=bias, **how)
        plain = generate(served.lm, [ids], tokens=20, eos=[0], temperature=temperature, seed=seed)
        assert told.choices[0].text == made.text_B[0] and made.rows != plain.rows


def test_a_client_that_leaves_frees_its_slot(served, client):
    stream = client.completions.create(
        model="moe", prompt="a", max_tokens=250, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: served.engine.stats().running == 0)
    wait_for(lambda: served.service.door.active == 0)


def test_adapters_by_name(tokenizer):
    other = make_lm(seed=1)
    with serving(tokenizer, adapters={"other": other}) as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["moe", "other"]
            for name, lm in (("moe", served.lm), ("other", other)):
                found = client.completions.create(model=name, prompt="the cat", max_tokens=12, temperature=0)
                ids = opened(served, "the cat")
                made = generate(lm, [ids], tokens=12, temperature=0, eos=0, tokenizer=served.tokenizer)
                assert (found.model, found.choices[0].text) == (name, made.text_B[0])


@pytest.mark.usefixtures("compiled")
def test_a_prompt_that_was_read_before_is_counted_as_cached(tokenizer):
    prompt = "line 7: the cat and the dog " * 18
    told = {"model": "moe", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    with serving(tokenizer, max_seq=512) as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            first, second = client.completions.create(**told), client.completions.create(**told)
        assert first.choices[0].text == second.choices[0].text == alone(served, opened(served, prompt), 8)[0]
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    assert second.usage.prompt_tokens == first.usage.prompt_tokens
