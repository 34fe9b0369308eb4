"""The tiny model: the same bytes every time, and a checkpoint like any other to transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from deploy.model_store import tiny_model_ready
from deploy.tiny_model_torch import CONTEXT_TOKENS, SPECIAL_TOKENS, VOCAB, build_tiny_model

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Say "how" the <weather> is in 東京',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


def test_another_process_writes_the_same_bytes(model_directory: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from deploy.tiny_model_torch import build_tiny_model;"
        "build_tiny_model(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "again")], cwd=ROOT, check=True)
    assert contents(tmp_path / "again") == contents(model_directory)


def test_another_seed_changes_the_weights_only(model_directory: Path, tmp_path: Path) -> None:
    mine = contents(model_directory)
    other = contents(build_tiny_model(tmp_path / "tiny", seed=1))
    assert {name for name in mine if mine[name] != other[name]} == {"model.safetensors", "pdserve_model.json"}


def test_a_second_build_touches_nothing(tmp_path: Path) -> None:
    directory = build_tiny_model(tmp_path / "tiny", seed=1)
    before = directory.stat().st_ino
    assert tiny_model_ready(directory, seed=1)
    assert build_tiny_model(directory, seed=1) == directory
    assert directory.stat().st_ino == before
    build_tiny_model(directory, seed=2)
    assert tiny_model_ready(directory, seed=2)


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="name another directory"):
        build_tiny_model(tmp_path)


def test_every_token_id_is_a_token(model_directory: Path) -> None:
    backend = Tokenizer.from_file(str(model_directory / "tokenizer.json"))
    assert sorted(backend.get_vocab().values()) == list(range(VOCAB))


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    first, *rest = tokenizer(text).input_ids
    assert first == tokenizer.bos_token_id
    assert tokenizer.decode(rest) == text


def test_special_tokens_are_single_and_vanish_from_text(tokenizer: Any) -> None:
    for token in SPECIAL_TOKENS:
        (token_id,) = tokenizer(token, add_special_tokens=False).input_ids
        assert tokenizer.decode([token_id]) == token
        assert tokenizer.decode([token_id], skip_special_tokens=True) == ""


def test_tool_markup_is_single_tokens_that_stay_in_text(tokenizer: Any) -> None:
    ids = tokenizer("<tool_call></tool_call>", add_special_tokens=False).input_ids
    assert len(ids) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call></tool_call>"


def test_chat_template_renders_the_roles(tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "<b> & ünïcode"},
    ]
    assert render(tokenizer, messages, add_generation_prompt=True) == (
        "<bos><|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
        "<|user|>\n<b> & ünïcode<|end|>\n<|assistant|>\n"
    )


def test_chat_template_renders_tools_as_json(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Rain?"}]
    text = render(tokenizer, messages, tools=[WEATHER], add_generation_prompt=True)
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0]
    assert json.loads(listed) == WEATHER
    assert text.endswith("</tools><|end|>\n<|user|>\nRain?<|end|>\n<|assistant|>\n")


@pytest.mark.parametrize("arguments", [{"city": "東京"}, '{"city": "東京"}'])
def test_chat_template_renders_calls_and_their_results(tokenizer: Any, arguments: object) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    text = render(tokenizer, messages, tools=[WEATHER])
    said = text.split("<|assistant|>\n")[1]
    parsed = json.loads(said.split("<tool_call>")[1].split("</tool_call>")[0])
    assert said.startswith("<tool_call>")
    assert parsed == {"name": "get_weather", "arguments": {"city": "東京"}}
    assert text.endswith("<|end|>\n<|tool|>\nsunny<|end|>\n")


def test_chat_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="no role narrator"):
        render(tokenizer, [{"role": "narrator", "content": "Once upon a time"}])


def test_greedy_decoding_takes_no_markup_fragment_or_blank(model_directory: Path, tokenizer: Any) -> None:
    rows = load_file(model_directory / "model.safetensors")["lm_head.weight"]
    silent = torch.nonzero(rows.abs().sum(dim=1) == 0).flatten().tolist()
    assert {*tokenizer.all_special_ids, *tokenizer("<tool_call></tool_call>").input_ids} <= set(silent)
    spoken = sorted(set(range(VOCAB)) - set(silent))
    assert len(spoken) > VOCAB * 0.9
    texts = [tokenizer.decode([token]) for token in spoken]
    assert not [text for text in texts if "\ufffd" in text or text.isspace()]


def test_transformers_loads_and_generates_varied_text(model_directory: Path, tokenizer: Any) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(model_directory, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == CONTEXT_TOKENS == tokenizer.model_max_length
    ends = GenerationConfig.from_pretrained(model_directory).eos_token_id
    assert ends == tokenizer.convert_tokens_to_ids(["<eos>", "<|end|>"])
    prompt = tokenizer("The with statement", return_tensors="pt")
    generated = model.generate(**prompt, do_sample=False, max_new_tokens=32)[0, prompt.input_ids.shape[1] :]
    assert len(generated) == 32
    assert len(set(generated.tolist())) > 16
