"""Embeds or classifies with LoRAX's own client: `lorax_pooling_client.py embed|classify BASE_URL GOLDENS`. Fails by an
assertion."""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from lorax import AsyncClient, Client
from lorax.errors import ValidationError

LONG = "the licence of the software " * 60


def refused(call, *words):
    """The call fails with the client's own error, which names the reason."""
    try:
        call()
    except ValidationError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"not refused: {words}")


def close(vector, expected):
    assert len(vector) == len(expected)
    assert max(abs(x - y) for x, y in zip(vector, expected)) < 1e-4, vector


def embed(url, goldens):
    client = Client(url)
    cases = goldens["vectors"]
    for case in cases:
        close(client.embed(case["text"]).embeddings, case["vector"])
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda case: client.embed(case["text"]), cases * 8))
    for case, answer in zip(cases * 8, answers):
        close(answer.embeddings, case["vector"])

    async def many():
        own = AsyncClient(url)
        return await asyncio.gather(*(own.embed(case["text"]) for case in cases))

    for case, answer in zip(cases, asyncio.run(many())):
        close(answer.embeddings, case["vector"])
    refused(lambda: client.embed(""), "inputs", "cannot be empty")
    refused(lambda: client.classify("a"), "does not support classification")
    refused(lambda: client.classify_batch(["a"]), "does not support classification")
    refused(lambda: client.generate("a"), "Embedding models don't support text generation")


def same(found, expected):
    assert [(one["entity_group"], one["word"], one["start"], one["end"]) for one in found] == [
        (one["entity_group"], one["word"], one["start"], one["end"]) for one in expected
    ], (found, expected)
    assert all(abs(one["score"] - other["score"]) < 1e-4 for one, other in zip(found, expected))


def classify(url, goldens):
    client = Client(url)
    cases = goldens["cases"]
    for case in cases:
        same(client.classify(case["text"]).entities, case["found"])
    for _ in range(3):
        for case, answer in zip(cases, client.classify_batch([case["text"] for case in cases])):
            same(answer.entities, case["found"])
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda case: client.classify(case["text"]), cases * 4))
    for case, answer in zip(cases * 4, answers):
        same(answer.entities, case["found"])
    # AsyncClient.classify of 0.6.3 cannot read LoRAX's own answer, which is a list.
    refused(lambda: client.classify(""), "inputs", "cannot be empty")
    refused(lambda: client.classify_batch([]), "inputs", "cannot be empty")
    refused(lambda: client.classify_batch(["a", ""]), "inputs", "cannot be empty")
    refused(lambda: client.classify(LONG), "60")
    refused(lambda: client.embed("a"), "does not support embeddings")
    refused(lambda: client.generate("a"), "Classify models don't support text generation")


if __name__ == "__main__":
    task, url, golden = sys.argv[1:]
    with open(golden) as file:
        {"embed": embed, "classify": classify}[task](url, json.load(file))
