"""A worker without Ray, in a process of its own: prints one JSON line when it is ready, then serves.

python -m tests.worker_vllm MODEL ROLE thread|own CORES [OVERRIDES]

OVERRIDES is a spec's keys as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict

from cluster.instance import Role
from cluster.spec import ClusterSpec
from cluster.worker import Worker


async def main() -> None:
    model, role, engine_process, cores, *overrides = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    spec = ClusterSpec.model_validate(
        {
            "model": model,
            "device": "cpu",
            "engine_process": engine_process,
            "engine_options": {
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 4096,
                "max_num_seqs": 32,
                "kv_cache_memory_bytes": 128 << 20,
            },
        }
        | (json.loads(overrides[0]) if overrides else {})
    )
    worker = Worker(
        spec,
        Role(role),
        instance_id=f"{role}-0",
        incarnation="1",
        host="127.0.0.1",
        cores=cores,
        phase_options={},
        on_phase=lambda phase: None,
    )
    ready = await worker.start()
    print(json.dumps(asdict(ready)), file=answers, flush=True)
    print(json.dumps({"ended": await worker.run()}), file=answers, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
