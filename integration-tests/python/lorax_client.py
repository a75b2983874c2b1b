"""Drives a server with LoRAX's own client: `lorax_client.py BASE_URL`. Every method and every argument is sent, and has
to change the answer or to be refused. Fails by an assertion."""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from lorax import AsyncClient, Client, MergedAdapters
from lorax.errors import GenerationError, NotFoundError, ValidationError
from lorax.types import FinishReason

PROMPT = "<|im_start|>user\nShow the name of all ships.<|im_end|>\n<|im_start|>assistant\n"
# Adapters of one rank.
PAIR = ["sql", "sentiment"]
PLAIN = "The capital of France is"
SCHEMA = {"type": "object", "properties": {"answer": {"type": "boolean"}}, "required": ["answer"], "additionalProperties": False}


def text(client, prompt=PLAIN, **options):
    options.setdefault("max_new_tokens", 12)
    return client.generate(prompt, **options).generated_text


def adapters(client):
    """Adapters by name, with a source, with a token, and merged."""
    base = text(client, PROMPT, max_new_tokens=24)
    sql = text(client, PROMPT, adapter_id="sql", max_new_tokens=24)
    pirate = text(client, PROMPT, adapter_id="pirate", max_new_tokens=24)
    assert sql.startswith("SELECT name") and len({base, sql, pirate}) == 3, (base, sql, pirate)
    named = dict(adapter_id="sql", max_new_tokens=24)
    assert text(client, PROMPT, adapter_source="local", **named) == sql
    assert text(client, PROMPT, api_token="a token", adapter_source="local", **named) == sql
    assert text(client, PROMPT, adapter_id="", max_new_tokens=24) == base
    one = MergedAdapters(ids=["sql"], weights=[1.0], merge_strategy="linear", density=0.0)
    assert text(client, PROMPT, merged_adapters=one, max_new_tokens=24) == sql
    for options in (
        dict(density=0.0),
        dict(merge_strategy="linear", density=1.0),
        dict(merge_strategy="ties", density=0.5, majority_sign_method="total"),
        dict(merge_strategy="ties", density=0.5, majority_sign_method="frequency"),
        dict(merge_strategy="dare_linear", density=0.8),
        dict(merge_strategy="dare_ties", density=0.8, majority_sign_method="total"),
    ):
        merged = MergedAdapters(ids=PAIR, weights=[0.6, 0.6], **options)
        assert text(client, PROMPT, merged_adapters=merged, max_new_tokens=24) != base, options


def sampling(client):
    """What draws, and what changes the logits."""
    greedy = text(client)
    assert text(client) == greedy
    drawn = [text(client, do_sample=True, seed=seed, temperature=1.5) for seed in range(4)]
    assert len(set(drawn)) > 1, drawn
    assert text(client, do_sample=True, seed=3, temperature=1.5) == drawn[3]
    assert text(client, temperature=1.5, seed=3) == drawn[3], "a temperature draws by itself"
    assert text(client, temperature=0.0) == greedy
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(typical_p=1e-6)):
        alone = [text(client, seed=seed, temperature=1.5, **narrow) for seed in range(3)]
        assert len(set(alone)) == 1, (narrow, alone)
    assert text(client, max_new_tokens=24, repetition_penalty=5.0) != text(client, max_new_tokens=24)


def lengths(client):
    """Where prompts and answers begin and end."""
    assert text(client, return_full_text=True) == PLAIN + text(client)
    assert len(client.generate(PLAIN, max_new_tokens=3).details.tokens) == 3
    stopped = client.generate(PLAIN, max_new_tokens=12, stop_sequences=["Paris"])
    assert stopped.generated_text.endswith("Paris") and stopped.details.finish_reason == FinishReason.StopSequence
    joined = "".join(token.text for token in stopped.details.tokens if not token.special)
    assert joined == stopped.generated_text
    cut = client.generate("one two three four five six seven", max_new_tokens=1, truncate=3)
    assert cut.details.prompt_tokens == 3
    ends = dict(adapter_id="sql", max_new_tokens=40)
    ended = client.generate(PROMPT, **ends).details
    assert ended.finish_reason == FinishReason.EndOfSequenceToken and ended.tokens[-1].special
    going = client.generate(PROMPT, ignore_eos_token=True, **ends).details
    assert going.finish_reason == FinishReason.Length and going.generated_tokens == 40
    assert client.generate(PROMPT, adapter_id="sql").details.finish_reason == FinishReason.EndOfSequenceToken


def details(client):
    """What is told of an answer."""
    plain = client.generate(PLAIN, max_new_tokens=4)
    assert plain.details.seed is None and plain.details.prefill == []
    assert plain.details.generated_tokens == len(plain.details.tokens) == 4
    assert all(token.logprob <= 0 and token.alternative_tokens is None for token in plain.details.tokens)
    assert client.generate(PLAIN, max_new_tokens=4, details=False).details is None
    assert client.generate(PLAIN, max_new_tokens=4, do_sample=True, seed=5).details.seed == 5
    prefill = client.generate(PLAIN, max_new_tokens=1, decoder_input_details=True).details.prefill
    assert "".join(token.text for token in prefill) == PLAIN
    assert prefill[0].logprob is None and all(token.logprob <= 0 for token in prefill[1:])
    for token in client.generate(PLAIN, max_new_tokens=4, return_k_alternatives=3).details.tokens:
        assert len(token.alternative_tokens) == 3 and token.alternative_tokens[0].id == token.id
    several = client.generate(PLAIN, max_new_tokens=8, best_of=2, do_sample=True, temperature=1.5)
    (other,) = several.details.best_of_sequences
    mean = lambda answer: sum(token.logprob for token in answer.tokens) / len(answer.tokens)
    assert mean(several.details) >= mean(other) and other.seed != several.details.seed


def formats(client):
    """Answers that follow a schema."""
    wanted = {"type": "json_object", "schema": SCHEMA}
    for options in (dict(), dict(do_sample=True, temperature=1.0, seed=1), dict(adapter_id="sentiment")):
        answer = json.loads(text(client, PROMPT, response_format=wanted, max_new_tokens=80, **options))
        assert list(answer) == ["answer"] and isinstance(answer["answer"], bool), answer


def streams(client):
    """A stream is the same answer, with the same arguments."""
    for options in (
        dict(),
        dict(adapter_id="sql", adapter_source="local", api_token="a token", ignore_eos_token=True),
        dict(merged_adapters=MergedAdapters(ids=PAIR, weights=[0.5, 0.5], density=0.5)),
        dict(do_sample=True, seed=4, temperature=1.2, top_k=40, top_p=0.9, typical_p=0.9, repetition_penalty=1.3),
        dict(stop_sequences=["name", "Paris"]),
        dict(return_full_text=True, truncate=5),
        dict(details=False),
        dict(response_format={"type": "json_object", "schema": SCHEMA}),
    ):
        events = list(client.generate_stream(PROMPT, max_new_tokens=16, **options))
        whole = client.generate(PROMPT, max_new_tokens=16, **options)
        assert all(event.generated_text is None and event.details is None for event in events[:-1])
        assert events[-1].generated_text == whole.generated_text, options
        said = "".join(event.token.text for event in events if not event.token.special)
        assert whole.generated_text.endswith(said), options
        if options.get("details", True):
            assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
            assert events[-1].details.finish_reason == whole.details.finish_reason
            assert events[-1].details.prompt_tokens == whole.details.prompt_tokens
        else:
            assert events[-1].details is None and whole.details is None


def fails(error, call, words):
    try:
        call()
    except error as refused:
        assert words in str(refused), refused
    else:
        raise AssertionError(f"served: {words}")


def refusals(client):
    """Errors have the client's own classes, in streams as well."""
    for error, options, words in [
        (ValidationError, dict(max_new_tokens=1_000_000), "max_new_tokens"),
        (ValidationError, dict(best_of=3, do_sample=True), "`best_of` must be > 0 and <= 2. Given: 3"),
        (ValidationError, dict(stop_sequences=["a", "b", "c", "d", "e"]), "`stop` supports up to 4"),
        (ValidationError, dict(watermark=True), "`watermark` is not supported"),
        (ValidationError, dict(return_k_alternatives=100), "return_k_alternatives"),
        (ValidationError, dict(truncate=1_000_000), "truncate"),
        (ValidationError, dict(response_format={"type": "json_object", "schema": {"type": "string", "pattern": "("}}), "`response_format` cannot be compiled"),
        (NotFoundError, dict(adapter_id="no-such-adapter", adapter_source="local"), "no-such-adapter"),
        (GenerationError, dict(adapter_id="/etc", adapter_source="local"), "/etc"),
    ]:
        fails(error, lambda: client.generate(PLAIN, **options), words)
        streamed = {name: value for name, value in options.items() if name not in ("best_of", "return_k_alternatives")}
        if streamed == options:
            fails(error, lambda: list(client.generate_stream(PLAIN, **options)), words)


def of_generators(client):
    """A model that generates has no embeddings: the error is one of the client's own, not a failure to read it."""
    for call in (client.embed, client.classify):
        try:
            call("San Francisco")
        except Exception as refused:
            assert type(refused).__module__ == "lorax.errors", repr(refused)
        else:
            raise AssertionError("served")


def batches(client):
    """Several requests at the same time over the client's own session."""
    names = [None, "sql", "pirate", "sentiment"] * 4
    alone = {name: text(client, PROMPT, adapter_id=name, max_new_tokens=8) for name in set(names)}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda name: text(client, PROMPT, adapter_id=name, max_new_tokens=8), names))
    assert together == [alone[name] for name in names]


class Waiting:
    """The asynchronous client with the methods of the other."""

    def __init__(self, url):
        self.url = url

    def generate(self, *args, **options):
        return asyncio.run(AsyncClient(self.url).generate(*args, **options))

    def generate_stream(self, *args, **options):
        async def collected():
            return [event async for event in AsyncClient(self.url).generate_stream(*args, **options)]

        return asyncio.run(collected())

    def embed(self, inputs):
        return asyncio.run(AsyncClient(self.url).embed(inputs))

    def classify(self, inputs):
        return asyncio.run(AsyncClient(self.url).classify(inputs))


async def concurrent(url):
    client = AsyncClient(url, headers={"x-request-id": "a-request"}, cookies={"a": "b"}, timeout=1)
    answers = await asyncio.gather(*(client.generate(PROMPT, adapter_id=name, max_new_tokens=8) for name in ["sql", "pirate"] * 4))
    assert len({answer.generated_text for answer in answers}) == 2


if __name__ == "__main__":
    (base,) = sys.argv[1:]
    blocking = Client(base, headers={"x-request-id": "a-request"}, cookies={"a": "b"}, timeout=120, max_session_retries=1)
    for one in (blocking, Waiting(base)):
        for check in (adapters, sampling, lengths, details, formats, streams, refusals, of_generators):
            check(one)
    batches(blocking)
    asyncio.run(concurrent(base))
