"""Saves tokenizers beside adapters with transformers, and compares the server's tokens and chats with its own.

Usage: adapter_texts.py URL MODEL ADAPTERS
"""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer

URL, MODEL, ADAPTERS = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

# Rows of the model.
ROWS = 320
TEXTS = [
    "Hello, world!",
    "a <|note|> b",
    "a  <strip>  b<strip>c",
    "<Raw>word wordy  word",
    "  leading <|tool|>and <|user|>trailing  ",
    "<|note|><|note|>",
    "héllo wörld 🙂 <|fin|>",
    "",
]
CHAT = [
    {"role": "user", "content": "What is <|note|> in it?"},
    {"role": "assistant", "content": "  Nothing. "},
    {"role": "user", "content": "héllo"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
TEMPLATE = "{% for m in messages %}{{ bos_token }}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
WITH_TOOLS = "{{ tools | length }} {{ tools[0].function.name }} " + TEMPLATE


def post(path, body):
    request = urllib.request.Request(
        URL + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def base():
    return AutoTokenizer.from_pretrained(MODEL)


def template_only(tokenizer):
    tokenizer.chat_template = TEMPLATE


def special(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|note|>", "<|fin|>"]})


def normal(tokenizer):
    tokens = [
        AddedToken("<strip>", lstrip=True, rstrip=True, normalized=False),
        AddedToken("<Raw>", normalized=False),
        AddedToken("word", single_word=True, normalized=True),
    ]
    tokenizer.add_tokens(tokens)


def other_end(tokenizer):
    tokenizer.add_special_tokens({"eos_token": "<|fin|>"})
    tokenizer.chat_template = TEMPLATE


def named(tokenizer):
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": WITH_TOOLS}


def definition(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def compare(name, folder):
    """Compares tokens of texts, and the prompts of chats."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for add_special in (True, False):
            wanted = tokenizer(text, add_special_tokens=add_special)["input_ids"]
            body = {"prompt": text, "add_special_tokens": add_special, "model": name}
            status, told = post("/tokenize", body)
            assert status == 200 and told["tokens"] == wanted, (name, text, told, wanted)
            back = tokenizer.decode(wanted, clean_up_tokenization_spaces=False)
            status, told = post("/detokenize", {"tokens": wanted, "model": name})
            assert status == 200 and told["prompt"] == back, (name, text, told, back)
    for tools in (None, [TOOL]):
        wanted = tokenizer.apply_chat_template(
            CHAT, tools=tools, add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
        if max(ids) >= ROWS or (tools and tokenizer.chat_template == base().chat_template):
            continue
        body = {"model": name, "messages": CHAT, "tools": tools, "max_tokens": 1, "add_generation_prompt": True}
        status, told = post("/v1/chat/completions", body)
        assert status == 200, (name, told)
        count = told["usage"]["prompt_tokens"]
        # A template that knows of no tools is told of them in words.
        if not tools or "tools" in str(tokenizer.chat_template):
            assert count == len(ids), (name, tools, count, len(ids))


def saved(number, change):
    """Saves the tokenizer of an adapter after a change."""
    folder = ADAPTERS / str(number)
    tokenizer = base()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(number), folder


def main():
    for number, change in enumerate([template_only, special, normal, other_end, named]):
        compare(*saved(number, change))

    # A reserved token gets a name.
    name, folder = saved(5, lambda tokenizer: None)

    def rename(content):
        content["added_tokens"][2]["content"] = "<|tool|>"
        vocab = content["model"]["vocab"]
        vocab["<|tool|>"] = vocab.pop("<|user|>")

    definition(folder, rename)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = ["<|tool|>", "<|assistant|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    compare(name, folder)

    # Another vocabulary is refused by the first entry that differs.
    name, folder = saved(6, lambda tokenizer: None)

    def exchange(content):
        vocab = content["model"]["vocab"]
        entry = next(text for text, number in vocab.items() if number == 300)
        vocab["another"] = vocab.pop(entry)

    definition(folder, exchange)
    status, told = post("/generate", {"inputs": "a", "parameters": {"adapter_id": name}})
    assert status == 422 and "the entry 300 is \"another\"" in told["error"], (status, told)

    # A token without a row is refused with its number, and only texts that have it.
    name, folder = saved(7, special)
    status, told = post("/generate", {"inputs": "a<|note|>", "parameters": {"adapter_id": name}})
    assert status in (422, 424) and str(ROWS) in told["error"], (status, told)
    body = {"inputs": "a", "parameters": {"adapter_id": name, "max_new_tokens": 2}}
    status, told = post("/generate", body)
    assert status == 200, told

    # The next request sees a changed template.
    name, folder = saved(0, lambda tokenizer: None)
    for text in ("one", "three words more"):
        (folder / "chat_template.jinja").write_text(text)
        body = {"model": name, "messages": CHAT, "max_tokens": 1}
        status, told = post("/v1/chat/completions", body)
        wanted = len(base()(text, add_special_tokens=False)["input_ids"])
        assert status == 200 and told["usage"]["prompt_tokens"] == wanted, (text, told)


main()
