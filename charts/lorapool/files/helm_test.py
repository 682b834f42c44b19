"""What `helm test` runs inside the cluster: strangers are refused, and a key lists models.

Standard library only. GATEWAY_URL is required; API_KEY, where given, must be accepted.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request

URL = os.environ["GATEWAY_URL"]
KEY = os.environ.get("API_KEY", "").strip()
DEADLINE = time.monotonic() + 60


def get(path: str, key: str = "") -> tuple[int, bytes]:
    request = urllib.request.Request(URL + path, headers={"Authorization": f"Bearer {key}"} if key else {})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            if time.monotonic() > DEADLINE:
                sys.exit(f"the gateway at {URL} cannot be reached: {error}")
            time.sleep(2)


def check(what: str, holds: bool, detail: object) -> None:
    print(("ok      " if holds else "FAILED  ") + what, "" if holds else detail, flush=True)
    if not holds:
        sys.exit(1)


status, body = get("/v1/models")
check("a call without a key gets 401", status == 401, (status, body[:300]))
check("... in OpenAI's shape", isinstance(json.loads(body).get("error"), dict), body[:300])
if KEY:
    status, body = get("/v1/models", KEY)
    check("a call with the key lists models", status == 200, (status, body[:300]))
    models = [model["id"] for model in json.loads(body)["data"]]
    print(f"{len(models)} models:", ", ".join(models[:20]) or "none yet; apply a BaseModel")
