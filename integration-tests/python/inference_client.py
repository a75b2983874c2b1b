"""Drives a server with huggingface_hub's InferenceClient: `inference_client.py URL BASE_MODEL`. Fails by an assertion."""

import sys

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError

ASK = "<|im_start|>user\nShow the name of all ships.<|im_end|>\n<|im_start|>assistant\n"
COUNT = "one one one one one one one"
CHAT = [{"role": "user", "content": "Show the name of all ships."}]


def texts(client: InferenceClient) -> None:
    """`text_generation` with each of its arguments."""
    def ask(prompt=COUNT, **options):
        return client.text_generation(prompt, **({"max_new_tokens": 12} | options))

    plain = ask()
    assert "".join(ask(stream=True)) == plain
    told = ask(details=True)
    assert told.generated_text == plain and told.details.finish_reason == "length"
    assert len(told.details.tokens) == 12 and told.details.seed is None
    assert ask(details=True, decoder_input_details=True).details.prefill[0].logprob is None
    last = list(ask(details=True, stream=True))[-1]
    assert last.generated_text == plain and last.details.generated_tokens == 12
    assert ask(ASK, adapter_id="sql").startswith("SELECT name")
    assert ask(return_full_text=True) == COUNT + plain
    changes = {
        "do_sample": dict(do_sample=True, seed=5),
        "frequency_penalty": dict(frequency_penalty=2),
        "max_new_tokens": dict(max_new_tokens=3),
        "repetition_penalty": dict(repetition_penalty=2),
        "stop": dict(stop=[plain[2:4]]),
        "temperature": dict(temperature=1.9, seed=5),
    }
    for name, options in changes.items():
        assert ask(**options) != plain, f"{name} changes nothing"
    long = "The capital of France is Paris. The capital of Italy is"
    assert ask(long, truncate=2) != ask(long), "truncate changes nothing"
    drawing = dict(do_sample=True, temperature=3.0, seed=5)
    drawn = ask(**drawing)
    assert drawn == ask(**drawing) != ask(**drawing | {"seed": 6})
    for name, value in {"top_k": 2, "top_p": 0.2, "typical_p": 0.2}.items():
        assert ask(**drawing | {name: value}) != drawn, f"{name} changes nothing"
    for options in [dict(temperature=-1), dict(top_n_tokens=2), dict(watermark=True), dict(max_new_tokens=0)]:
        try:
            ask(**options)
        except (HfHubHTTPError, ValidationError):
            continue
        raise AssertionError(f"served: {options}")


def chats(client: InferenceClient, base: str) -> None:
    """`chat_completion` with each of its arguments. Who names no model gets the base model."""
    def ask(**options):
        return client.chat_completion(**({"messages": CHAT, "max_tokens": 12, "temperature": 0} | options))

    def text(answer) -> str:
        return answer.choices[0].message.content

    plain = ask()
    assert plain.model == base and plain.object == "chat.completion", plain
    assert text(ask(model="sql")).startswith("SELECT name")
    streamed = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in streamed if part.choices) == text(plain)
    assert streamed[-1].usage.completion_tokens == plain.usage.completion_tokens
    count = [{"role": "user", "content": "Count: one, one, one, one."}]
    changes = {
        "extra_body": dict(extra_body={"adapter_id": "sql"}),
        "frequency_penalty": dict(messages=count, frequency_penalty=2, max_tokens=24),
        "presence_penalty": dict(messages=count, presence_penalty=2, max_tokens=24),
        "max_tokens": dict(max_tokens=2),
        "stop": dict(stop=[" "]),
        "temperature": dict(temperature=1.9, seed=5),
        "top_p": dict(temperature=1.9, seed=5, top_p=0.9),
        "logit_bias": dict(logit_bias={"28": 100}),
    }
    for name, options in changes.items():
        without = {key: value for key, value in options.items() if key != name}
        assert text(ask(**options)) != text(ask(**without)), f"{name} changes nothing"
    scored = ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in scored)
    assert len({choice.message.content for choice in ask(n=3, temperature=1.5).choices}) == 3


if __name__ == "__main__":
    url, model = sys.argv[1:]
    texts(InferenceClient(url))
    chats(InferenceClient(base_url=f"{url}/v1"), model)
    chats(InferenceClient(f"{url}/v1"), model)
