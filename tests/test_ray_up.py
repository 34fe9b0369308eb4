from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from ray import serve

from cluster.spec import ClusterSpec
from deploy import ray_up


def test_serve_that_never_came_up_is_told_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    deploying: Future[None] = Future()
    deploying.set_exception(RuntimeError("proxy: cannot bind socket for metrics"))
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(ray_up.DidNotStart, match="cannot bind socket for metrics"):
        ray_up._require_deployed(ClusterSpec(model="m"), deploying)
