"""An S3 server (moto), and AWS's own client beside it: obeys a line of JSON after the other, and answers each."""

import json
import logging
import os
import sys

import boto3
from boto3.s3.transfer import TransferConfig
from moto.server import ThreadedMotoServer

answers = os.fdopen(os.dup(1), "w", buffering=1)
sys.stdout = open(os.devnull, "w")
logging.getLogger("werkzeug").disabled = True

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
address = "http://{}:{}".format(*server.get_host_and_port())


def client(endpoint=address):
    keys = {"aws_access_key_id": "secret-id", "aws_secret_access_key": "secret-key", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=endpoint, **keys)


def put(bucket, key, content):
    if bucket not in {known["Name"] for known in client().list_buckets()["Buckets"]}:
        client().create_bucket(Bucket=bucket)
    # Readable without a signature, as the tests of the other clouds read it.
    client().put_object(Bucket=bucket, Key=key, Body=bytes.fromhex(content), ACL="public-read")


def upload(bucket, key, path):
    """In parts, as large files are."""
    client().upload_file(path, bucket, key, Config=TransferConfig(multipart_threshold=1, multipart_chunksize=5 << 20))


def get(bucket, key, endpoint):
    found = client(endpoint).get_object(Bucket=bucket, Key=key)
    return [found["ContentLength"], found["ETag"], found["Body"].read().hex()]


def delete(bucket, key):
    client().delete_object(Bucket=bucket, Key=key)


calls = {"put": put, "upload": upload, "get": get, "delete": delete}
print(json.dumps(address), file=answers)
for line in sys.stdin:
    name, *args = json.loads(line)
    print(json.dumps(calls[name](*args)), file=answers)
