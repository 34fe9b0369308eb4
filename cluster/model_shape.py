"""The shape of a transformer: what its latency, its weights and its KV follow from.

`shape_of` takes a known name or a Hugging Face `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention: all heads share one compressed KV (DeepSeek-V2, arXiv 2405.04434, 2.1).

    Attributes:
        kv_rank: width of the compressed KV.
        rope_dim: width of the one rotary key, and of each query's rotary part.
        value_dim: width of a head's value; `ModelShape.head_dim` is its key without the rotary part.
        query_rank: width of the compressed query, 0 for a query that isn't.
    """

    kv_rank: int
    rope_dim: int
    value_dim: int
    query_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Mixture of experts.

    Attributes:
        count, active: routed experts of a layer, and those that one token uses.
        ffn: inner width of one.
        shared_ffn: inner width of all shared experts together, which every token uses.
        dense_layers: layers that have a plain MLP instead.
    """

    count: int
    active: int
    ffn: int
    shared_ffn: int = 0
    dense_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer. Norms and biases are left out: below 0.1 % of the parameters.

    Layers with sliding-window attention count as full ones, so their KV and attention are upper bounds.

    Attributes:
        ffn: inner width of the MLP, of the dense layers in a mixture of experts.
        learned_positions: rows of the table of position embeddings; 0 for rotary or ALiBi.
        dtype_bytes, kv_dtype_bytes: of one weight and of one element of KV.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    learned_positions: int = 0
    dtype_bytes: float = 2
    kv_dtype_bytes: float = 2
    latent: LatentAttention | None = None
    experts: Experts | None = None

    @property
    def moe_layers(self) -> int:
        return self.layers - self.experts.dense_layers if self.experts else 0

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert in one layer."""
        return self._mlp_parameters(self.experts.ffn) if self.experts else 0

    @property
    def shared_parameters(self) -> int:
        """Of all layers, without routed experts and embeddings: what every token is multiplied with."""
        per_layer = self._attention_parameters()
        if self.experts is None:
            return self.layers * (per_layer + self._mlp_parameters(self.ffn))
        router = self.hidden * self.experts.count
        moe = self._mlp_parameters(self.experts.shared_ffn) + router
        dense = self.experts.dense_layers * self._mlp_parameters(self.ffn)
        return self.layers * per_layer + dense + self.moe_layers * moe

    @property
    def head_parameters(self) -> int:
        """Of the output projection, which only a token that is sampled after is multiplied with."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        return self.shared_parameters + self.routed_parameters + self._embedding_parameters()

    @property
    def routed_parameters(self) -> int:
        """Of all routed experts of all layers."""
        return self.moe_layers * self.experts.count * self.expert_parameters if self.experts else 0

    @property
    def active_parameters(self) -> int:
        """Those that one token uses, embeddings included."""
        return self.shared_parameters + self._routed_active() + self._embedding_parameters()

    @property
    def weight_bytes(self) -> float:
        return self.parameters * self.dtype_bytes

    def weight_bytes_per_rank(self, ranks: int, data_parallel_size: int = 1) -> float:
        """Of an instance of so many ranks, in a group of so many that share the experts."""
        routed = self.routed_parameters * self.dtype_bytes
        return (self.weight_bytes - routed + routed / data_parallel_size) / ranks

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers; of latent attention the compressed KV."""
        if self.latent:
            width = self.latent.kv_rank + self.latent.rope_dim
        else:
            width = 2 * self.kv_heads * self.head_dim
        return int(self.layers * width * self.kv_dtype_bytes)

    def kv_bytes_per_token_and_rank(
        self, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> float:
        """On the rank that holds most.

        Ranks beyond the number of KV heads repeat them, and latent attention has one KV for all heads.
        """
        parts = 1 if self.latent else min(tensor_parallel_size, self.kv_heads)
        layers = -(-self.layers // pipeline_parallel_size)
        return self.kv_bytes_per_token / self.layers * layers / parts

    @property
    def flops_per_token(self) -> float:
        """Of all linear layers for one token, without the output projection."""
        return 2.0 * (self.shared_parameters + self._routed_active())

    @property
    def attention_flops_per_square_token(self) -> float:
        """Of causal attention over a prompt of n tokens, all layers, divided by n^2.

        That is, for one unit of `Batch.prefill_attention`. A query meets half of the prompt on average; each
        meeting is a dot product and a weighted sum.
        """
        return self.layers * self.heads * float(self._key_dim() + self._value_dim())

    @property
    def decode_flops_per_context_token(self) -> float:
        """Of attention, all layers, for one new token and one token of its context.

        Latent attention multiplies with the compressed KV itself, which is wider than a head.
        """
        width = self._key_dim() + self._value_dim()
        if self.latent:
            width = 2 * self.latent.kv_rank + self.latent.rope_dim
        return 2.0 * self.layers * self.heads * width

    def _routed_active(self) -> int:
        return self.moe_layers * self.experts.active * self.expert_parameters if self.experts else 0

    def _embedding_parameters(self) -> int:
        tables = 1 if self.tied_embeddings else 2
        return tables * self.head_parameters + self.learned_positions * self.hidden

    def _mlp_parameters(self, ffn: int) -> int:
        return (3 if self.gated_mlp else 2) * self.hidden * ffn

    def _key_dim(self) -> int:
        return self.head_dim + (self.latent.rope_dim if self.latent else 0)

    def _value_dim(self) -> int:
        return self.latent.value_dim if self.latent else self.head_dim

    def _attention_parameters(self) -> int:
        queries, out = self.heads * self._key_dim(), self.heads * self._value_dim()
        if self.latent is None:
            return self.hidden * (queries + 2 * self.kv_heads * self.head_dim + out)
        rank = self.latent.query_rank
        query = self.hidden * rank + rank * queries if rank else self.hidden * queries
        down = self.hidden * (self.latent.kv_rank + self.latent.rope_dim)
        up = self.latent.kv_rank * self.heads * (self.head_dim + self.latent.value_dim)
        return query + down + up + out * self.hidden


def _dense(
    name: str, sizes: tuple[int, int, int, int], ffn: int, vocab: int, max_positions: int
) -> ModelShape:
    """`sizes`: layers, hidden, heads, kv heads; heads of hidden / heads, a gated MLP."""
    layers, hidden, heads, kv_heads = sizes
    return ModelShape(
        name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=hidden // heads,
        ffn=ffn, vocab=vocab, max_positions=max_positions,
    )  # fmt: skip


def _opt(name: str, layers: int, hidden: int, heads: int) -> ModelShape:
    """OPT (arXiv 2205.01068, table 1); vocabulary and two extra positions as in its Hugging Face config."""
    plain = _dense(name, (layers, hidden, heads, heads), 4 * hidden, 50272, 2048)
    return replace(plain, gated_mlp=False, tied_embeddings=True, learned_positions=2050)


# From the config.json that each model was published with.
_SHAPES = {
    shape.name: shape
    for shape in (
        _opt("opt-13b", 40, 5120, 40),
        _opt("opt-66b", 64, 9216, 72),
        _opt("opt-175b", 96, 12288, 96),
        _dense("llama-2-7b", (32, 4096, 32, 32), 11008, 32000, 4096),
        _dense("llama-2-70b", (80, 8192, 64, 8), 28672, 32000, 4096),
        _dense("llama-3-8b", (32, 4096, 32, 8), 14336, 128256, 8192),
        _dense("llama-3-70b", (80, 8192, 64, 8), 28672, 128256, 8192),
        _dense("codellama-34b", (48, 8192, 64, 8), 22016, 32000, 16384),
        _dense("internlm-20b", (60, 5120, 40, 40), 13824, 103168, 4096),
        _dense("qwen-72b", (80, 8192, 64, 64), 24576, 152064, 32768),
        replace(_dense("qwen3-32b", (64, 5120, 64, 8), 25600, 151936, 40960), head_dim=128),
        replace(_dense("phi-2", (32, 2560, 32, 32), 10240, 51200, 2048), gated_mlp=False),
        replace(
            _dense("bloom-176b", (70, 14336, 112, 112), 57344, 250880, 2048),
            gated_mlp=False,
            tied_embeddings=True,
        ),
        replace(
            _dense("mixtral-8x7b", (32, 4096, 32, 8), 14336, 32000, 32768),
            experts=Experts(count=8, active=2, ffn=14336),
        ),
        replace(
            _dense("deepseek-v3", (61, 7168, 128, 128), 18432, 129280, 163840),
            head_dim=128,
            dtype_bytes=1,  # published in FP8
            latent=LatentAttention(kv_rank=512, rope_dim=64, value_dim=128, query_rank=1536),
            experts=Experts(count=256, active=8, ffn=2048, shared_ffn=2048, dense_layers=3),
        ),
    )
}


def named_shape(name: str) -> ModelShape:
    """A published model. Raises SpecError, with the names, for one that isn't known."""
    found = _SHAPES.get(name.lower())
    if found is None:
        raise SpecError(
            file="model", path="", value=name, allowed=f"known: {', '.join(_SHAPES)}; or name a config.json"
        )
    return found


def shape_of(name_or_path: str) -> ModelShape:
    """A published model's name, or a `config.json` or the directory of one. Raises SpecError."""
    path = Path(name_or_path)
    return shape_from_config(path) if path.exists() else named_shape(name_or_path)


def shape_from_config(path: Path | str) -> ModelShape:
    """The shape that a Hugging Face `config.json`, or the directory of one, describes. Raises SpecError."""
    from cluster.model_config import read_config  # it imports this module

    return read_config(Path(path))
