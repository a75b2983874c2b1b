"""Sends every field of OpenAI's schemas: `openai_fields.py BASE_URL BASE_MODEL`.

The fields are those of the types of the `openai` package, so that a new version of it brings new ones, and the test fails
until somebody has decided what each does. A field must change the answer, be refused by its name, or be among those that
`docs/api.md` says to change nothing.
"""

import sys
from pathlib import Path

from openai import BadRequestError, OpenAI
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats

#: Fields that change no answer, by what they are.
NOTHING = {
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "Once"},
    "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "a",
    "service_tier": "auto",
    "store": True,
    "user": "a",
    "verbosity": "low",
}

TOOL = {"name": "f", "parameters": {"type": "object", "properties": {}}}
DRAWING = {"temperature": 1.5, "seed": 1, "max_tokens": 12}

#: For the others: a value, and what the request has beside it, with and without the field.
BOTH = {
    "frequency_penalty": (2, {"max_tokens": 24}),
    "logit_bias": ({"28": 100}, {}),
    "max_tokens": (2, {}),
    "model": ("sql", {}),
    "n": (2, {}),
    "presence_penalty": (2, {"max_tokens": 24}),
    "seed": (2, {"temperature": 1.5}),
    "stop": (["e", "a", " ", "\n"], {}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "temperature": (2, {"seed": 1}),
    "top_p": (0.01, DRAWING),
}
CHAT = BOTH | {
    "audio": ({"format": "wav", "voice": "a"}, {}),
    "function_call": ({"name": "f"}, {}),
    "functions": ([TOOL], {}),
    "logprobs": (True, {}),
    "max_completion_tokens": (2, {}),
    "messages": ([{"role": "user", "content": "Hello"}], {}),
    "moderation": ({"mode": "score"}, {}),
    "reasoning_effort": ("low", {}),
    "response_format": ({"type": "json_object"}, {}),
    "tool_choice": ("required", {}),
    "tools": ([{"type": "function", "function": TOOL}], {}),
    "top_logprobs": (2, {"logprobs": True}),
    "web_search_options": ({}, {}),
}
COMPLETION = BOTH | {
    "best_of": (4, DRAWING),
    "echo": (True, {}),
    "logprobs": (1, {}),
    "prompt": ("Hello", {}),
    "suffix": ("the end", {}),
}


def answer(create, request: dict):
    """All that an answer says, but for what is different every time."""
    response = create(**request)
    if request.get("stream"):
        parts = [part.model_dump(exclude={"id", "created"}) for part in response]
        return [part for part in parts if part["choices"] or part["usage"]]
    return response.model_dump(exclude={"id", "created"})


def check(create, base: dict, table: dict, fields: set, page: str) -> None:
    """Sends each field beside what the request has without it."""
    unknown = fields - table.keys() - NOTHING.keys()
    assert not unknown, f"nobody has decided what becomes of {sorted(unknown)}"
    for field in sorted(fields & table.keys()):
        value, beside = table[field]
        without = {"max_tokens": 6, "temperature": 0} | base | beside
        if field == "max_completion_tokens":
            without.pop("max_tokens")
        with_it = without | {field: value}
        try:
            assert answer(create, with_it) != answer(create, without), f"{field} changes nothing"
        except BadRequestError as refused:
            names = {field, "tools", "functions"} if field in ("tool_choice", "function_call") else {field}
            assert refused.body["param"].split(".")[0] in names, f"{field}: {refused}"
    for field in sorted(fields & NOTHING.keys()):
        request = {"max_tokens": 6, "temperature": 0} | base
        same = answer(create, request | {field: NOTHING[field]}) == answer(create, request)
        assert same and f"`{field}`" in page, f"{field} changes the answer, or docs/api.md does not tell of it"


def fields_of(module, kinds: tuple) -> set:
    return {field for kind in kinds for field in getattr(module, kind).__annotations__}


if __name__ == "__main__":
    url, model = sys.argv[1:]
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    text = (Path(__file__).parents[2] / "docs/api.md").read_text()
    kinds = ("CompletionCreateParamsBase", "CompletionCreateParamsStreaming", "CompletionCreateParamsNonStreaming")
    say = [{"role": "user", "content": "Count: one, one, one, one."}]
    check(client.chat.completions.create, {"model": model, "messages": say}, CHAT, fields_of(chats, kinds), text)
    prompt = "one one one one one one one one"
    base = {"model": model, "prompt": prompt}
    check(client.completions.create, base, COMPLETION, fields_of(completions, kinds), text)
