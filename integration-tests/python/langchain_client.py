"""Drives a server with LangChain's ChatOpenAI: `langchain_client.py BASE_URL BASE_MODEL`. Fails by an assertion."""

import asyncio
import sys
from typing import Literal

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai import BadRequestError
from pydantic import BaseModel, ConfigDict

ASK = "Show the name of all ships."


def answers(chat) -> None:
    """Whole answers, streams, batches, asynchronous calls."""
    sql = chat(model="sql")
    whole = sql.invoke(ASK)
    assert whole.content.startswith("SELECT name"), whole
    assert whole.usage_metadata["output_tokens"] > 0 and whole.response_metadata["finish_reason"] == "stop"
    assert whole.response_metadata["model_name"] == "sql" and whole.response_metadata["system_fingerprint"]
    assert "".join(part.content for part in sql.stream(ASK)) == whole.content
    streamed = list(chat(model="sql", stream_usage=True).stream(ASK))
    assert any(part.usage_metadata for part in streamed), "the usage of a stream"
    assert chat(model="sql", streaming=True).invoke(ASK).content == whole.content
    assert [answer.content for answer in sql.batch([ASK, ASK])] == [whole.content] * 2
    assert asyncio.run(sql.ainvoke(ASK)).content == whole.content
    talk = [SystemMessage("Answer in SQL."), HumanMessage("Hi"), AIMessage("Hello"), HumanMessage(ASK)]
    assert sql.invoke(talk).content
    assert sql.invoke([HumanMessage([{"type": "text", "text": ASK}])]).content == whole.content
    assert sql.bind(stop=["name"]).invoke(ASK).content == "SELECT ", "a stop string of the call"


def arguments(chat, base: str) -> None:
    """Each argument that it sends changes the answer."""
    plain = chat().invoke(ASK)
    changes = {
        "temperature": dict(temperature=1.9, seed=5),
        "max_tokens": dict(max_tokens=2),
        "max_completion_tokens": dict(max_completion_tokens=2),
        "stop": dict(stop=[" "]),
        "logit_bias": dict(logit_bias={28: 100}),
        "extra_body": dict(extra_body={"adapter_id": "sql"}),
    }
    for name, options in changes.items():
        changed = chat(**options).invoke(ASK)
        assert changed.content != plain.content, f"{name} changes nothing"
    count = "Count: one, one, one, one."
    for name in ("presence_penalty", "frequency_penalty"):
        assert chat(**{name: 2}).invoke(count).content != chat().invoke(count).content, f"{name} changes nothing"
    draw = dict(temperature=1.9, max_tokens=12)
    first = chat(seed=1, **draw).invoke(ASK).content
    assert first == chat(seed=1, **draw).invoke(ASK).content != chat(seed=2, **draw).invoke(ASK).content
    assert chat(seed=1, top_p=0.001, **draw).invoke(ASK).content != first
    scored = chat(logprobs=True, top_logprobs=2).invoke(ASK).response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in scored)
    choices = chat(n=3, temperature=1.5).generate([[HumanMessage(ASK)]]).generations[0]
    assert len({choice.text for choice in choices}) == 3, choices
    hints = dict(service_tier="auto", store=False, metadata={"a": "b"}, verbosity="low")
    assert chat(use_responses_api=False, **hints).invoke(ASK).content == plain.content


class Ship(BaseModel):
    """A ship"""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["sail", "steam"]
    fast: bool


def structured(chat) -> None:
    """Answers that follow a schema."""
    model = chat(max_tokens=64).with_structured_output(Ship, method="json_schema")
    assert isinstance(model.invoke("Describe a ship."), Ship)
    told = chat(max_tokens=64).with_structured_output(Ship, method="json_schema", include_raw=True).invoke("Describe a ship.")
    assert isinstance(told["parsed"], Ship) and told["parsing_error"] is None


def refusals(chat) -> None:
    """Errors are those that LangChain's users catch."""
    try:
        chat().invoke("too long " * 10_000)
    except ContextOverflowError as error:
        assert "maximum context length" in str(error)
    else:
        raise AssertionError("a prompt that is too long was answered")
    for options in [dict(top_p=2), dict(reasoning_effort="low"), dict(extra_body={"no_such_field": 1})]:
        try:
            chat(**options).invoke(ASK)
        except BadRequestError:
            continue
        raise AssertionError(f"served: {options}")


if __name__ == "__main__":
    url, base = sys.argv[1:]

    def new(model: str = base, **options) -> ChatOpenAI:
        options = {"temperature": 0, "max_tokens": 24, "max_retries": 0} | options
        if "max_completion_tokens" in options:
            options.pop("max_tokens")
        return ChatOpenAI(base_url=url, api_key="none", model=model, **options)

    answers(new)
    arguments(new, base)
    structured(new)
    refusals(new)
