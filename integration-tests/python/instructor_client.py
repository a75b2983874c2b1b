"""Drives a server with instructor: `instructor_client.py BASE_URL BASE_MODEL`. Fails by an assertion."""

import asyncio
import sys
from typing import Literal

import instructor
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict


class Ship(BaseModel):
    """What a model of any size can fill in."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["sail", "steam"]
    fast: bool
    ports: Literal[1, 2, 3]


class Anything(BaseModel):
    """Any object."""

    model_config = ConfigDict(extra="allow")


if __name__ == "__main__":
    url, model = sys.argv[1:]
    to = dict(base_url=url, api_key="none", max_retries=0)
    question = [{"role": "user", "content": "Describe a ship."}]
    # Space between values is unbounded; with a seed the answers are always the same.
    ask = dict(model=model, max_tokens=256, seed=1, max_retries=0, messages=question)
    for temperature in (0, 1):
        ask["temperature"] = temperature
        client = instructor.from_openai(OpenAI(**to), mode=instructor.Mode.JSON_SCHEMA)
        ship, completion = client.create_with_completion(response_model=Ship, **ask)
        assert isinstance(ship, Ship) and completion.usage.completion_tokens > 0
        parts = list(client.create_partial(response_model=Ship, **ask))
        assert parts[-1].kind in ("sail", "steam")
        asynchronous = instructor.from_openai(AsyncOpenAI(**to), mode=instructor.Mode.JSON_SCHEMA)
        assert isinstance(asyncio.run(asynchronous.create(response_model=Ship, **ask)), Ship)
    ask["temperature"] = 0
    client = instructor.from_openai(OpenAI(**to), mode=instructor.Mode.JSON)
    # A small model does not come to an end by itself: this is the token of `}`.
    assert isinstance(client.create(response_model=Anything, logit_bias={109: 100}, **ask), Anything)
