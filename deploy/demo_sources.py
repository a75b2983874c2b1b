#!/usr/bin/env python3
"""Serves adapters by name from a hub and from a bucket to which the official clients have uploaded them.

Starts a hub and an S3 server on this machine, uploads adapters of the demo with `huggingface_hub` and `boto3`, starts
`lorax-launcher`, and asks for each adapter at its source. Needs the environment of `make venv`.
"""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path

os.environ["HF_HUB_DISABLE_XET"] = "1"  # the hub on this machine has no such store; read when the client is imported

import boto3  # noqa: E402
from huggingface_hub import HfApi  # noqa: E402

from demo import ADAPTERS, MODEL, PROMPT, ROOT, TARGET, free_port, wait_until_ready  # noqa: E402


def started(stack: ExitStack, *command: object) -> str:
    """Starts a server that ends when its input is closed; returns the address that it prints first."""
    process = stack.enter_context(subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    stack.callback(process.stdin.close)
    return process.stdout.readline().strip().strip('"')


def ask(port: int, adapter: str | None, source: str | None) -> str:
    """Returns an answer of the adapter, or of the base model."""
    chat = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    parameters = dict(max_new_tokens=32, adapter_id=adapter, adapter_source=source)
    body = json.dumps(dict(inputs=chat, parameters=parameters)).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["generated_text"]


def main() -> None:
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        hub = started(stack, TARGET / "debug" / "examples" / "hub")
        bucket = started(stack, sys.executable, ROOT / "sources" / "tests" / "s3_server.py")
        print(f"a hub at {hub} and an S3 server at {bucket}")

        api = HfApi(endpoint=hub, token="mine")
        api.create_repo("demo/sql")
        commit = api.upload_folder(repo_id="demo/sql", folder_path=ADAPTERS / "sql").oid
        keys = dict(AWS_ACCESS_KEY_ID="demo", AWS_SECRET_ACCESS_KEY="demo", AWS_REGION="us-east-1")
        s3 = boto3.client("s3", endpoint_url=bucket, aws_access_key_id="demo", aws_secret_access_key="demo", region_name="us-east-1")
        s3.create_bucket(Bucket="adapters")
        for file in sorted((ADAPTERS / "pirate").iterdir()):
            s3.upload_file(str(file), "adapters", f"pirate/{file.name}")
        print(f"huggingface_hub has uploaded demo/sql (commit {commit[:12]}), boto3 s3://adapters/pirate")

        port = free_port(8080)
        command = [TARGET / "release" / "lorax-launcher", "--model-id", MODEL, "--port", port, "--device", "cpu"]
        command += ["--adapter-buckets", "s3://adapters", "--adapter-cache", home]
        environment = os.environ | keys | dict(HF_ENDPOINT=hub, HF_HOME=home, S3_ENDPOINT_URL=bucket, LOG_LEVEL="warn")
        server = stack.enter_context(subprocess.Popen(list(map(str, command)), env=environment))
        stack.callback(server.terminate)
        wait_until_ready(server, port)
        for adapter, source in [(None, None), ("demo/sql", "hub"), (f"demo/sql@{commit}", "hub"), ("s3://adapters/pirate", "s3")]:
            print(f"{adapter or 'base model':<50} {json.dumps(ask(port, adapter, source))}")


if __name__ == "__main__":
    main()
