"""The part of a spec that says how offline batches are kept and run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from cluster.frozen import Frozen


class BatchSpec(Frozen):
    """Offline batches (`/v1/files`, `/v1/batches`).

    Attributes:
        directory: where files and batches are kept; default: a directory of the cluster's name under the
            cache of the user who runs the ingress. Replicas on several nodes need one that all of them see,
            with clocks that agree within seconds: a replica takes over what another no longer renews.
        most_at_once: requests of batches under way at once, per ingress replica.
        largest_file_mb: of an uploaded file, in megabytes.
        most_lines: requests of one batch.
        keep_days: files and ended batches are removed after that.
    """

    directory: str | None = Field(default=None, min_length=1)
    most_at_once: PositiveInt = 256
    largest_file_mb: PositiveInt = 200
    most_lines: PositiveInt = 50_000
    keep_days: PositiveFloat = 30.0

    def path(self, cluster: str) -> Path:
        """The directory of a cluster of that name; it need not exist."""
        if self.directory is not None:
            return Path(self.directory).expanduser()
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if not os.path.isabs(cache):  # a user without a home
            cache = tempfile.gettempdir()
        return Path(cache) / "pdserve" / "batches" / cluster
