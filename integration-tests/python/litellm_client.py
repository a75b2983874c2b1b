"""Drives a server with litellm: `litellm_client.py BASE_URL BASE_MODEL`. Fails by an assertion."""

import asyncio
import os
import sys

# Its table of prices would be fetched otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

from typing import Literal  # noqa: E402

import litellm  # noqa: E402
from pydantic import BaseModel, ConfigDict  # noqa: E402

litellm.suppress_debug_info = True

ASK = [{"role": "user", "content": "Show the name of all ships."}]
ALL = dict(temperature=0, max_tokens=24, num_retries=0)


class Ship(BaseModel):
    """A ship"""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["sail", "steam"]
    fast: bool


def chats(to: dict, base: str) -> None:
    """Whole answers and streams of the base model and of an adapter, by both of its providers."""
    for provider in ("openai", "hosted_vllm"):
        def ask(model="sql", **options):
            return litellm.completion(**(dict(model=f"{provider}/{model}", messages=ASK) | to | ALL | options))

        whole = ask()
        assert whole.choices[0].message.content.startswith("SELECT name"), whole
        assert whole.usage.prompt_tokens > 0 and whole.choices[0].finish_reason == "stop"
        streamed = list(ask(stream=True, stream_options={"include_usage": True}))
        text = "".join(part.choices[0].delta.content or "" for part in streamed if part.choices)
        assert text == whole.choices[0].message.content
        assert asyncio.run(litellm.acompletion(model=f"{provider}/sql", messages=ASK, **to, **ALL)).choices[0].message.content == text
        plain = ask(base).choices[0].message.content
        for name, options in {
            "max_completion_tokens": dict(max_tokens=None, max_completion_tokens=2),
            "max_tokens": dict(max_tokens=2),
            "stop": dict(stop=[" "]),
            "temperature": dict(temperature=1.9, seed=5),
            "top_p": dict(temperature=1.9, seed=5, top_p=0.9),
            "logit_bias": dict(logit_bias={"28": 100}),
            "extra_body": dict(extra_body={"adapter_id": "sql"}),
        }.items():
            assert ask(base, **options).choices[0].message.content != plain, f"{name} changes nothing"
        count = [{"role": "user", "content": "Count: one, one, one, one."}]
        for name in ("presence_penalty", "frequency_penalty"):
            with_it = ask(base, messages=count, **{name: 2}).choices[0].message.content
            assert with_it != ask(base, messages=count).choices[0].message.content, f"{name} changes nothing"
        drawn = ask(base, n=3, temperature=1.5)
        assert len({choice.message.content for choice in drawn.choices}) == 3
        scored = ask(base, logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in scored)
        assert ask(base, user="a").choices[0].message.content == plain


def structured(to: dict, base: str) -> None:
    """An answer that follows a schema."""
    ask = [{"role": "user", "content": "Describe a ship."}]
    answer = litellm.completion(model=f"openai/{base}", messages=ask, response_format=Ship, **to, **ALL | {"max_tokens": 64})
    assert isinstance(Ship.model_validate_json(answer.choices[0].message.content), Ship)


def completions(to: dict, base: str) -> None:
    """The legacy route."""
    def ask(**options):
        model = f"text-completion-openai/{base}"
        return litellm.text_completion(model=model, prompt="The capital of France is", **to, **(ALL | options))

    whole = ask()
    assert whole.choices[0].text
    assert "".join(part.choices[0].text or "" for part in ask(stream=True)) == whole.choices[0].text
    assert ask(echo=True).choices[0].text.startswith("The capital")
    assert len(ask(n=2, temperature=1.5).choices) == 2
    assert ask(stop=[" "]).choices[0].text != whole.choices[0].text


def refusals(to: dict, base: str) -> None:
    """Errors are of litellm's own classes."""
    for error, options in [
        (litellm.NotFoundError, dict(model="openai/no-such-adapter")),
        (litellm.BadRequestError, dict(temperature=-1)),
        (litellm.ContextWindowExceededError, dict(messages=[{"role": "user", "content": "too long " * 10_000}])),
    ]:
        try:
            litellm.completion(**(dict(model=f"openai/{base}", messages=ASK) | to | ALL | options))
        except error:
            continue
        raise AssertionError(f"served: {options}")


if __name__ == "__main__":
    url, base = sys.argv[1:]
    to = dict(api_base=url, api_key="none")
    chats(to, base)
    completions(to, base)
    structured(to, base)
    refusals(to, base)
