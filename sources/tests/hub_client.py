"""Drives a hub with the official client, and prints what it saw."""

import json
import sys
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars

disable_progress_bars()


def outcome(call):
    """What a call returns, or the name of its error."""
    try:
        return call()
    except HfHubHTTPError as error:
        return type(error).__name__
    except Exception as error:  # the test compares what it is
        return f"{type(error).__name__}: {error}"


def info(repo, revision=None, token=False):
    found = HfApi().model_info(repo, revision=revision, files_metadata=True, token=token)
    files = {file.rfilename: [file.size, file.lfs.sha256 if file.lfs else None] for file in found.siblings}
    return {"sha": found.sha, "files": files}


def file(repo, name, revision=None, token=False):
    return Path(hf_hub_download(repo, name, revision=revision, token=token)).read_bytes().hex()


def upload(repo, folder, token):
    api = HfApi(token=token)
    api.create_repo(repo, exist_ok=True)
    return api.upload_folder(repo_id=repo, folder_path=folder).oid


def snapshot(repo, revision=None):
    return snapshot_download(repo, revision=revision, token=False)


calls = {"info": info, "file": file, "upload": upload, "snapshot": snapshot}
print(json.dumps([outcome(lambda: calls[name](*args)) for name, *args in json.load(sys.stdin)]))
