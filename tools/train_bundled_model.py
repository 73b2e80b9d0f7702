"""Training of the bundled model, a small Qwen3.5 hybrid with a tiny, untrained vision tower.

The corpus is CPython's own: the source of its standard library (without tests, IDLE and the like) and the
language reference in `pydoc_data.topics`. One file in twenty-five, selected by the hash of its name, is held
out. The held-out text is written beside the model's directory, and `hlwq demo` measures on it. All random
numbers are seeded: the same Python, torch and machine type give the same model.

    python tools/train_bundled_model.py src/hlwq/bundled/model    # half an hour on two cores

Needs torch, transformers and tokenizers. The model in the repository was made with CPython 3.11.7,
torch 2.13.0 and transformers 5.23.0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

VOCAB_SIZE = 2048
SEQUENCE_LENGTH = 512
BATCH_SIZE = 8
STEPS = 1600
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
HELD_OUT_CHARACTERS = 400_000
LEFT_OUT = ("test", "idlelib", "lib2to3", "turtledemo", "site-packages", "ensurepip", "encodings", "pydoc_data")
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus() -> tuple[list[str], list[str]]:
    """Training and held-out documents, in a fixed order."""
    from pydoc_data import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    training, held_out = [], []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if any(part in LEFT_OUT for part in Path(name).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        is_held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 25 == 0
        (held_out if is_held_out else training).append(text)
    training += [text for _, text in sorted(topics.topics.items())]
    return training, held_out


def train_tokenizer(documents: list[str]) -> Qwen3_5Tokenizer:
    """Small vocabulary in Qwen3.5's tokenizer class, which transformers uses for this model in any case."""
    tokenizer = Qwen3_5Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>").train_new_from_iterator(
        documents,
        vocab_size=VOCAB_SIZE,
        new_special_tokens=SPECIAL_TOKENS,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.model_max_length = 4096
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Qwen3_5Tokenizer) -> Qwen3_5ForConditionalGeneration:
    """Model with in_features of multiples of 128; three layers of linear attention, then one of full attention."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3_5Config(
        text_config=dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=10000.0,
                partial_rotary_factor=0.25,
                mrope_section=[3, 3, 2],
                mrope_interleaved=True,
            ),
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=1,
            hidden_size=64,
            intermediate_size=160,
            num_heads=2,
            patch_size=16,
            out_hidden_size=256,
            num_position_embeddings=16,
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    return Qwen3_5ForConditionalGeneration(config)


def learning_rate(step: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps; a few are enough to try the script")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    training, held_out = corpus()
    tokenizer = train_tokenizer(training)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    stream: list[int] = []
    order = torch.randperm(len(training)).tolist()
    for index in order:
        stream += tokenizer(training[index])["input_ids"] + [end]
    tokens = torch.tensor(stream)
    held_out_text = "\n".join(held_out)[:HELD_OUT_CHARACTERS]
    held = torch.tensor(tokenizer(held_out_text)["input_ids"])
    print(f"{len(tokens):,} training tokens, {len(held):,} held-out tokens", flush=True)

    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    trained = [(n, p) for n, p in model.named_parameters() if not n.startswith("model.visual")]
    matrices = [p for n, p in trained if p.ndim >= 2]
    others = [p for n, p in trained if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def held_out_loss() -> float:
        batches = held[: len(held) // (SEQUENCE_LENGTH + 1) * (SEQUENCE_LENGTH + 1)].view(-1, SEQUENCE_LENGTH + 1)
        with torch.no_grad():
            return sum(loss_of(rows).item() for rows in batches[:64].split(8)) / len(batches[:64].split(8))

    started = time.time()
    model.train()
    for step in range(arguments.steps):
        starts = torch.randint(len(tokens) - SEQUENCE_LENGTH - 1, (BATCH_SIZE,))
        batch = torch.stack([tokens[s : s + SEQUENCE_LENGTH + 1] for s in starts])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} elapsed {time.time() - started:.0f} s", flush=True)
        if step % 400 == 399:
            print(f"step {step} held-out perplexity {math.exp(held_out_loss()):.2f}", flush=True)

    model = model.eval().to(torch.bfloat16)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    reloaded = AutoTokenizer.from_pretrained(arguments.out)
    assert reloaded(held_out_text)["input_ids"] == held.tolist(), "the tokenizer does not come back as it was trained"
    (arguments.out.parent / "held_out.txt").write_text(held_out_text, encoding="utf-8")
    (arguments.out / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessorFast",
                "patch_size": 16,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "size": {"longest_edge": 16384, "shortest_edge": 1024},
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
