"""Validates a server's OpenAPI document, and sends it what the document allows and what it does not.

usage: openapi_check.py URL

No answer may be a server's error, or contradict the document in its status, type or schema.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

from openapi_spec_validator import OpenAPIV31SpecValidator

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> None:
    url = sys.argv[1]
    document = json.load(urllib.request.urlopen(f"{url}/openapi.json"))
    faults = [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()]
    if faults:
        sys.exit("\n".join(faults))
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{url}/openapi.json", "--checks", CHECKS]
    command += ["--phases", "fuzzing", "--max-examples", "15", "--seed", "1", "--request-timeout", "20", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


main()
