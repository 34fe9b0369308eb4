"""A plain, unsplit vLLM engine: what a request's tokens must be. Run as a program, in a process of its own.

    python -m tests.reference_vllm MODEL < requests.json > tokens.json

A request is `{"prompt": [ids], "max_tokens": n}`, with `"adapter": directory` for one of a LoRA adapter; the
answer is the list of their greedy tokens.
"""

from __future__ import annotations

import json
import os
import sys

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def main() -> None:
    os.environ.update(ENVIRONMENT)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    requests = json.load(sys.stdin)
    adapters = {request.get("adapter"): None for request in requests}
    for number, path in enumerate(adapters, 1):
        adapters[path] = LoRARequest(path, number, path) if path else None
    engine = LLM(
        model=sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=128,
        kv_cache_memory_bytes=256 << 20,
        distributed_executor_backend="uni",
        enable_lora=any(adapters.values()),
    )
    tokens: list[list[int]] = [[] for _ in requests]
    for path, adapter in adapters.items():  # one by one: on CPUs, vLLM mixes them up
        members = [index for index, request in enumerate(requests) if request.get("adapter") == path]
        results = engine.generate(
            [TokensPrompt(prompt_token_ids=requests[index]["prompt"]) for index in members],
            [
                SamplingParams(temperature=0.0, max_tokens=requests[index]["max_tokens"], ignore_eos=True)
                for index in members
            ],
            use_tqdm=False,
            lora_request=adapter,
        )
        for index, result in zip(members, results, strict=True):
            tokens[index] = list(result.outputs[0].token_ids)
    json.dump(tokens, answers)


if __name__ == "__main__":
    main()
