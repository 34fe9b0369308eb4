"""Reads a Hugging Face `config.json`: dense, grouped-query and latent attention, mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.errors import SpecError
from cluster.json_file import read_object
from cluster.model_shape import Experts, LatentAttention, ModelShape


def read_config(path: Path) -> ModelShape:
    """The shape that a Hugging Face `config.json`, or the directory of one, describes.

    Raises SpecError for a file that is none, a missing size (named), and layers that aren't attention.
    """
    file = path / "config.json" if path.is_dir() else path
    raw = read_object(file, kind="a config", name="a config.json or its directory")
    return _ConfigReader(file, raw).shape()


# Hugging Face configurations whose MLP has two matrices, and those that tie embeddings unless told otherwise.
_PLAIN_MLP = {"opt", "gpt2", "bloom", "falcon", "gpt_neox", "gptj", "phi", "starcoder2", "mpt", "gpt_bigcode"}
_TIED = {"opt", "gpt2", "bloom", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt_bigcode"}
_LEARNED_POSITIONS = {"opt": 2, "gpt2": 0, "gpt_bigcode": 0}  # and rows beyond max_position_embeddings
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0}


class _ConfigReader:
    """One config.json. A multimodal one keeps the language model's sizes in `text_config`."""

    def __init__(self, file: Path, raw: Mapping[str, object]) -> None:
        self._file = file
        nested = raw.get("text_config")
        self._prefix = "text_config." if isinstance(nested, Mapping) else ""
        self._outer, self._raw = raw, nested if isinstance(nested, Mapping) else raw
        self._type = str(self._raw.get("model_type", raw.get("model_type", "")))

    def shape(self) -> ModelShape:
        self._refuse_other_layers()
        hidden = self._size("hidden_size", "n_embd", "n_embed", "d_model")
        heads = self._size("num_attention_heads", "n_head", "n_heads")
        positions = self._size(
            "max_position_embeddings", "n_positions", "seq_length", "max_seq_len", default=2048
        )
        extra = _LEARNED_POSITIONS.get(self._type)
        experts = self._experts()
        dense_ffn = self._size(
            "intermediate_size_mlp", "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden
        )
        tied = self._outer.get("tie_word_embeddings", self._raw.get("tie_word_embeddings"))
        return ModelShape(
            name=str(self._outer.get("_name_or_path") or self._file.resolve().parent.name),
            layers=self._size("num_hidden_layers", "n_layer", "n_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=self._kv_heads(heads),
            head_dim=self._size("qk_nope_head_dim", "head_dim", default=hidden // heads),
            ffn=dense_ffn,
            vocab=self._size("vocab_size"),
            max_positions=positions,
            gated_mlp=self._type not in _PLAIN_MLP,
            tied_embeddings=self._type in _TIED if tied is None else bool(tied),
            learned_positions=0 if extra is None else positions + extra,
            dtype_bytes=self._dtype_bytes(),
            latent=self._latent(),
            experts=experts,
        )

    def _size(self, *keys: str, default: int | None = None) -> int:
        """The first of these keys that is set. Raises SpecError, with the first key, when none is."""
        for key in keys:
            value = self._raw.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self._error(key, value, "expected a whole number")
            return value
        if default is None:
            raise self._error(
                keys[0], None, f"the config needs it, or {', '.join(keys[1:]) or 'nothing else'}"
            )
        return default

    def _error(self, key: str, value: object, allowed: str) -> SpecError:
        return SpecError(file=str(self._file), path=self._prefix + key, value=value, allowed=allowed)

    def _refuse_other_layers(self) -> None:
        kinds = self._raw.get("layer_types")
        other = set(kinds) - _ATTENTION_LAYERS if isinstance(kinds, list) else set()
        if other:
            raise self._error(
                "layer_types", sorted(other), "a shape has attention in every layer: profile it"
            )

    def _kv_heads(self, heads: int) -> int:
        if self._raw.get("multi_query") and not self._raw.get("new_decoder_architecture"):
            return 1
        return self._size("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads)

    def _latent(self) -> LatentAttention | None:
        if self._raw.get("kv_lora_rank") is None:
            return None
        return LatentAttention(
            kv_rank=self._size("kv_lora_rank"),
            rope_dim=self._size("qk_rope_head_dim"),
            value_dim=self._size("v_head_dim"),
            query_rank=self._size("q_lora_rank", default=0),
        )

    def _experts(self) -> Experts | None:
        count = self._size("n_routed_experts", "num_local_experts", "num_experts", default=0)
        if count < 2:
            return None
        layers = self._size("num_hidden_layers", "n_layer")
        step = (
            self._size("moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step", default=1) or 1
        )
        dense = self._size("first_k_dense_replace", default=0)
        only = self._raw.get("mlp_only_layers")
        sparse = max(0, (layers - dense) // step - (len(only) if isinstance(only, list) else 0))
        ffn = self._size("moe_intermediate_size", "intermediate_size")
        shared = self._size("shared_expert_intermediate_size", default=0)
        return Experts(
            count=count,
            active=self._size("num_experts_per_tok", "experts_per_token", "moe_topk"),
            ffn=ffn,
            shared_ffn=shared or ffn * self._size("n_shared_experts", default=0),
            dense_layers=layers - sparse,
        )

    def _dtype_bytes(self) -> float:
        quantized = self._outer.get("quantization_config", self._raw.get("quantization_config"))
        if isinstance(quantized, Mapping):
            bits = quantized.get("bits")
            return float(bits) / 8 if isinstance(bits, int) else 1.0 if "8" in str(quantized) else 2.0
        for holder in (self._raw, self._outer):
            name = holder.get("dtype", holder.get("torch_dtype"))
            if name is not None:
                return _DTYPE_BYTES.get(str(name).removeprefix("torch."), 2.0)
        return 2.0
