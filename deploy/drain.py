"""`pdserve drain`: one instance is emptied and replaced, by way of an ingress."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request

from cluster.errors import EnvironmentProblem
from deploy.status import nobody_answers

# The cluster's own deadline (`deadlines.drain_s`) ends it sooner.
DEADLINE_S = 3600.0


def drain_instance(url: str, instance_id: str, api_key: str | None = None) -> bool:
    """Waits until it is empty; returns whether no request was cut off. Raises EnvironmentProblem."""
    request = urllib.request.Request(
        f"{url.rstrip('/')}/pdserve/drain/{urllib.parse.quote(instance_id, safe='')}",
        method="POST",
        headers={"authorization": f"Bearer {api_key}"} if api_key else {},
    )
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return bool(json.load(answer)["clean"])
    except urllib.error.HTTPError as error:
        with error:
            try:
                why = json.load(error)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                raise nobody_answers(url, error) from None
        raise EnvironmentProblem(
            problem=f"{instance_id} was not drained: {why}", remedy="see `pdserve status`"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise nobody_answers(url, error) from None
