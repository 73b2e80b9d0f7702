"""GGUF sources of several families: what transformers dequantizes is what is quantized, and is the original model.

A file of a Gemma holds its norms' weights with 1 added, one of a Llama its queries and keys in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import hlwq
from hlwq.containers import Reader
from hlwq.evaluate.model import load_model
from hlwq.sources import locate

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2", "qwen3_moe")
NAMES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "mistral": "llama"}
"""What GGUF calls a family, where it has another name."""
# What a file does not say is a default of transformers.
UNSAID: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "gemma2": {"query_pre_attn_scalar": 256},
    "gemma3_text": {"query_pre_attn_scalar": 256, "num_hidden_layers": 6},
    "qwen3_moe": {"moe_intermediate_size": 768, "norm_topk_prob": True},
}
WORDS = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(33, 126))]
TOKENS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))


def write_gguf(file: Path, source: Path, family: str) -> None:
    """A checkpoint as a GGUF file, by the rules of llama.cpp's converter."""
    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    reader, name = Reader(source), NAMES.get(family, family)
    config = reader.config
    writer = GGUFWriter(file, name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(1_000_000.0 if family == "gemma3_text" else 10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_layer_norm_eps(config.get("norm_epsilon", 1e-5))
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"] or 0)
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_token_types([3 if word.startswith("<") and len(word) > 1 else 1 for word in WORDS])
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    architecture = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name)
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])
    stacks: dict[str, list[np.ndarray]] = {}
    for tensor in reader.tensors:
        values = reader.read(tensor).float().numpy()
        if family.startswith("gemma") and tensor.endswith("norm.weight"):
            values = values + 1
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if name == "llama" and part in tensor:
                pairs = values.reshape(config[heads], 2, -1, *values.shape[1:])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
        if ".experts." in tensor:
            before, _, after = tensor.partition(".experts.")
            stacks.setdefault(f"{before}.experts.{after.split('.')[1]}.weight", []).append(values)
        else:
            writer.add_tensor(names.get_name(tensor, try_suffixes=(".weight", ".bias")), values)
    for tensor, parts in stacks.items():
        writer.add_tensor(names.get_name(tensor, try_suffixes=(".weight",)), np.stack(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logprobs(model: Any) -> Tensor:
    """Of each token after those before it."""
    with torch.inference_mode():
        logits = model(input_ids=TOKENS).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_is_the_model_that_it_was_made_from(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    source, file = save_model(tmp_path / "source", family, **UNSAID.get(family, {})), tmp_path / "model.gguf"
    write_gguf(file, source, family)
    options = {"dtype": torch.float32, "trust_remote_code": False}
    original = logprobs(AutoModelForCausalLM.from_pretrained(source, **options))
    alone = logprobs(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, **options))
    read = logprobs(load_model(locate(file), dtype=torch.float32)[0])
    assert torch.allclose(alone, original, atol=1e-4)
    assert torch.allclose(read, original, atol=1e-4)  # exactly bfloat16, as the original is

    hlwq.quantize(source, tmp_path / "from-source", "rtn", bits=8)
    hlwq.quantize(file, tmp_path / "from-gguf", "rtn", bits=8)
    one, other = Reader(tmp_path / "from-source"), Reader(tmp_path / "from-gguf")
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
