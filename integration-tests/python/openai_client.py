"""Drives a server with OpenAI's own client: `openai_client.py BASE_URL BASE_MODEL`. Fails by an assertion."""

import sys
from typing import Literal

from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel, ConfigDict


def completions(client: OpenAI, base: str) -> None:
    """The four forms of a prompt, echo, log-probabilities, streams."""
    create = client.completions.create
    options = dict(max_tokens=6, temperature=0)
    one = create(model=base, prompt="The capital of France is", **options)
    assert one.choices[0].text and one.usage.completion_tokens <= 6
    many = create(model=base, prompt=["The capital of France is", "Once upon a time"], **options)
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[0].text == one.choices[0].text, "a prompt in a list is the same prompt"
    ids = create(model=base, prompt=[[504, 3575], [504]], **options)
    assert len(ids.choices) == 2 and create(model=base, prompt=[504, 3575], **options).choices[0].text == ids.choices[0].text
    echo = create(model=base, prompt="Hello there", echo=True, logprobs=2, **options).choices[0]
    assert echo.text.startswith("Hello there") and echo.logprobs.token_logprobs[0] is None
    assert len(echo.logprobs.tokens) == len(echo.logprobs.token_logprobs) == len(echo.logprobs.top_logprobs)
    events = list(create(model=base, prompt="The capital of France is", stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(e.choices[0].text for e in events if e.choices) == one.choices[0].text
    assert events[-1].usage.completion_tokens == one.usage.completion_tokens


def chats(client: OpenAI, base: str) -> None:
    """Adapters by the model's name, streams, log-probabilities."""
    create = client.chat.completions.create
    options = dict(messages=[{"role": "user", "content": "Show the name of all ships."}], max_tokens=24, temperature=0)
    answers = {model: create(model=model, **options).choices[0].message.content for model in (base, "sql", "pirate")}
    assert len(set(answers.values())) == 3, answers
    assert answers["sql"].startswith("SELECT name"), answers
    pieces = [e.choices[0].delta.content or "" for e in create(model="sql", stream=True, **options) if e.choices]
    assert "".join(pieces) == answers["sql"]
    scored = create(model="sql", logprobs=True, top_logprobs=3, **options).choices[0]
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in scored.logprobs.content)
    assert scored.finish_reason == "stop"


class Ship(BaseModel):
    """A ship"""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["sail", "steam"]
    fast: bool


def structured(client: OpenAI, base: str) -> None:
    """Answers that follow a schema, and choices."""
    ask = dict(model=base, messages=[{"role": "user", "content": "Describe a ship."}], max_tokens=64)
    answer = client.chat.completions.parse(response_format=Ship, **ask)
    assert isinstance(answer.choices[0].message.parsed, Ship)
    drawn = client.chat.completions.parse(response_format=Ship, n=4, seed=1, **ask)
    assert all(isinstance(choice.message.parsed, Ship) for choice in drawn.choices) and len(drawn.choices) == 4
    with client.chat.completions.stream(response_format=Ship, **ask) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Ship)


def choices(client: OpenAI, base: str) -> None:
    """Several answers to a prompt, and the best of more."""
    ask = dict(model=base, prompt="Once upon a time", max_tokens=8, temperature=1.2, seed=3)
    several = client.completions.create(n=4, **ask)
    assert len({choice.text for choice in several.choices}) == 4
    assert several.usage.prompt_tokens == client.completions.create(**ask).usage.prompt_tokens, "a prompt counts once"
    scored = client.completions.create(n=4, logprobs=0, **ask)
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in scored.choices]
    best = client.completions.create(best_of=4, **ask)
    assert best.choices[0].text == scored.choices[means.index(max(means))].text


def refusals(client: OpenAI, base: str) -> None:
    """Errors have the client's own classes."""
    for error, options in [
        (NotFoundError, dict(model="no-such-adapter", prompt="x")),
        (BadRequestError, dict(model=base, prompt="x", temperature=-1)),
        (BadRequestError, dict(model=base, prompt="x", n=2, best_of=1)),
        (BadRequestError, dict(model=base, prompt="")),
    ]:
        try:
            client.completions.create(**options)
        except error as refused:
            assert refused.body["message"], refused
        else:
            raise AssertionError(f"served: {options}")


if __name__ == "__main__":
    url, model = sys.argv[1:]
    openai = OpenAI(base_url=url, api_key="none", max_retries=0)
    assert [m.id for m in openai.models.list()] == [model] and openai.models.retrieve(model).id == model
    completions(openai, model)
    chats(openai, model)
    choices(openai, model)
    structured(openai, model)
    refusals(openai, model)
