"""`pdserve explain`: why a request went where it went, and what came of it."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from cluster.errors import ServingError
from deploy.status import DEADLINE_S, nobody_answers
from router.decisions import MOST_REQUESTS

# Each ingress replica knows its own requests, and the proxy in front chooses one per connection.
TRIES = 16


class UnknownRequest(ServingError):
    """No ingress that was asked knows the request. Facts: `request`, `asked`."""

    http_status = 404
    reason = "unknown-request"

    request: str
    asked: int

    def describe(self) -> str:
        return (
            f"no ingress knows a request {self.request!r} ({self.asked} asked): give the id that the API "
            f"answered with, or your x-request-id; the last {MOST_REQUESTS:,} of each ingress are kept"
        )


def fetch_explanation(url: str, request_id: str) -> dict[str, Any]:
    """What the ingress that had the request says of it.

    Raises:
        UnknownRequest: none of the replicas knows it.
        EnvironmentProblem: nobody answers there.
    """
    path = f"{url.rstrip('/')}/pdserve/decisions/{urllib.parse.quote(request_id, safe='')}"
    asked: set[str] = set()
    for _ in range(TRIES):
        try:
            with urllib.request.urlopen(path, timeout=DEADLINE_S) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            with error:
                ingress = error.headers.get("x-pdserve-ingress")
                replicas = int(error.headers.get("x-pdserve-ingresses") or 1)
            if error.code != 404 or ingress is None:
                raise nobody_answers(url, error) from None
            asked.add(ingress)
            if len(asked) >= replicas:
                break
        except (OSError, ValueError) as error:
            raise nobody_answers(url, error) from None
    raise UnknownRequest(request=request_id, asked=len(asked))
