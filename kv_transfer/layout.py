"""KvLayout: where a model's KV lies, over the ranks of an engine and in the memory of each. Pure values.

A *place* is what one layer keeps of one token for one KV head: key and value together, as vLLM packs them.
For MLA it is the latent of one token, one "head" that every rank has whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class LayoutError(ValueError):
    """A layout that no engine can have, or two that can't be of one model."""


class Order(StrEnum):
    """How a rank's memory is ordered, outermost first, in vLLM's letters: layer, block, head, token (N),
    content.

    The first two have one region of memory per layer, the last one has one for all layers of the rank.
    """

    LBHNC = "LBHNC"
    LBNHC = "LBNHC"
    BLHNC = "BLHNC"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """The KV cache of one engine.

    Attributes:
        layers: layers of the model that keep KV.
        kv_heads: KV heads of the model; 1 for MLA.
        place_bytes: bytes of one token and KV head in one layer, key and value together.
        block_tokens: tokens of a block.
        blocks: blocks of each rank.
        order: of every rank's memory.
        tensor_parallel, pipeline_parallel: ranks that share the heads, and the layers.
        is_mla: whether every tensor-parallel rank has the whole.
        stage_layers: layers of each pipeline stage; empty for as equal as they can be, the later stages one
            more.

    Raises LayoutError for values that can't be.
    """

    layers: int
    kv_heads: int
    place_bytes: int
    block_tokens: int
    blocks: int
    order: Order = Order.LBHNC
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    is_mla: bool = False
    stage_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        counts = ("layers", "kv_heads", "place_bytes", "block_tokens", "blocks")
        for name in (*counts, "tensor_parallel", "pipeline_parallel"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.is_mla and self.kv_heads != 1:
            raise LayoutError(f"MLA has one latent per token, not {self.kv_heads} KV heads: give kv_heads=1")
        few, many = sorted((self.kv_heads, self.tensor_parallel))
        if many % few:
            raise LayoutError(
                f"{self.kv_heads} KV heads can't be shared by {self.tensor_parallel} tensor-parallel ranks: "
                "one must divide the other"
            )
        if self.pipeline_parallel > self.layers:
            raise LayoutError(f"{self.layers} layers can't be split into {self.pipeline_parallel} stages")
        given = self.stage_layers
        if given and (len(given), sum(given)) != (self.pipeline_parallel, self.layers):
            raise LayoutError(
                f"stage_layers {list(given)} must be {self.pipeline_parallel} counts that add up to "
                f"{self.layers}"
            )

    @property
    def ranks(self) -> int:
        """Ranks of the engine; rank `stage * tensor_parallel + tensor rank`, as vLLM counts."""
        return self.tensor_parallel * self.pipeline_parallel

    def layers_of(self, rank: int) -> range:
        """The layers that a rank has."""
        counts = self.stage_layers
        if not counts:
            least, more = divmod(self.layers, self.pipeline_parallel)
            counts = tuple(
                least + (stage >= self.pipeline_parallel - more) for stage in range(self.pipeline_parallel)
            )
        stage = rank // self.tensor_parallel
        begin = sum(counts[:stage])
        return range(begin, begin + counts[stage])

    def heads_of(self, rank: int) -> range:
        """The KV heads that a rank has; with fewer heads than ranks several have the same."""
        tensor_rank = rank % self.tensor_parallel
        if self.tensor_parallel <= self.kv_heads:
            each = self.kv_heads // self.tensor_parallel
            return range(tensor_rank * each, (tensor_rank + 1) * each)
        head = tensor_rank * self.kv_heads // self.tensor_parallel
        return range(head, head + 1)

    def holders(self, layer: int, head: int) -> list[int]:
        """The ranks that have a layer's head, all with the same content."""
        return [
            rank
            for rank in range(self.ranks)
            if layer in self.layers_of(rank) and head in self.heads_of(rank)
        ]

    def regions_of(self, rank: int) -> int:
        """Separate pieces of memory that a rank has."""
        return 1 if self.order is Order.BLHNC else len(self.layers_of(rank))

    def block_bytes(self, rank: int) -> int:
        """Bytes of one block in one region of a rank."""
        layers = len(self.layers_of(rank)) if self.order is Order.BLHNC else 1
        return layers * self._layer_bytes(rank)

    def region_bytes(self, rank: int) -> int:
        """Bytes of one region of a rank."""
        return self.blocks * self.block_bytes(rank)

    @property
    def token_bytes(self) -> int:
        """Bytes from one token to the next of the same head, layer and block."""
        heads = self.kv_heads // self.tensor_parallel or 1
        return self.place_bytes * heads if self.order is Order.LBNHC else self.place_bytes

    def offset(self, rank: int, layer: int, head: int) -> tuple[int, int]:
        """(region, offset in a block) of the first token of a layer's head, which the rank must have."""
        index, slot = self.layers_of(rank).index(layer), self.heads_of(rank).index(head)
        within = slot * self.place_bytes * (1 if self.order is Order.LBNHC else self.block_tokens)
        if self.order is Order.BLHNC:
            return 0, index * self._layer_bytes(rank) + within
        return index, within

    def _layer_bytes(self, rank: int) -> int:
        return self.block_tokens * len(self.heads_of(rank)) * self.place_bytes

    def model_facts(self) -> tuple[int, int, int, bool]:
        """What must be equal for two engines to read each other's KV."""
        return self.layers, self.kv_heads, self.place_bytes, self.is_mla
