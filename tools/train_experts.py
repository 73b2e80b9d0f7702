"""Training of a small Qwen3.5 mixture of experts from the bundled hybrid, for tests and measurements.

Its attention, embeddings and vision tower are the hybrid's, its experts begin as slices of the hybrid's MLPs, and all
but the vision tower is trained on the hybrid's corpus. All random numbers are seeded.

    python tools/train_experts.py tests/data/experts    # forty minutes on two cores

Needs torch, transformers and tokenizers. The model in the repository was made with CPython 3.11.7, torch 2.13.0 and
transformers 5.23.0, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from train_bundled_model import SEQUENCE_LENGTH, corpus
from transformers import AutoTokenizer, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen3_5 import Qwen3_5ForConditionalGeneration

EXPERTS, CHOSEN, INNER = 16, 4, 64
BATCH_SIZE = 8
STEPS = 800
PEAK_LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 30
BALANCE = 0.01
"""Weight of the loss that keeps experts equally busy."""


def build_model(dense: Path) -> Qwen3_5MoeForConditionalGeneration:
    """The mixture with what it has of the hybrid, and slices of the hybrid's MLPs as experts."""
    config = json.loads((dense / "config.json").read_text())
    text = config["text_config"]
    del text["intermediate_size"]
    text |= {
        "model_type": "qwen3_5_moe_text",
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": INNER,
        "router_aux_loss_coef": BALANCE,
    }
    config |= {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    config["vision_config"]["model_type"] = "qwen3_5_moe_vision"
    model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig.from_dict(config))
    source = Qwen3_5ForConditionalGeneration.from_pretrained(dense, dtype=torch.float32).state_dict()
    state = model.state_dict()
    state |= {name: values for name, values in source.items() if name in state}
    for layer in range(text["num_hidden_layers"]):
        mlp = f"model.language_model.layers.{layer}.mlp."
        gate, up, down = (source[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
        slices = len(gate) // INNER
        for expert in range(EXPERTS):
            rows = slice(expert % slices * INNER, (expert % slices + 1) * INNER)
            of_both = torch.cat([gate[rows], up[rows]])
            state[f"{mlp}experts.gate_up_proj"][expert] = of_both + 0.1 * of_both.std() * torch.randn_like(of_both)
            state[f"{mlp}experts.down_proj"][expert] = slices / 2 * down[:, rows]
    model.load_state_dict(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dense", type=Path, default=Path("src/hlwq/bundled/model"), help="the bundled hybrid")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps; a few are enough to try the script")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    training, held_out = corpus()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    stream: list[int] = []
    for index in torch.randperm(len(training)).tolist():
        stream += tokenizer(training[index])["input_ids"] + [end]
    tokens = torch.tensor(stream)
    held = torch.tensor(tokenizer("\n".join(held_out)[:200_000])["input_ids"])
    model = build_model(arguments.dense)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    trained = [(n, p) for n, p in model.named_parameters() if not n.startswith("model.visual")]
    optimizer = torch.optim.AdamW([p for _, p in trained], betas=(0.9, 0.95), weight_decay=0.05)

    def loss_of(batch: torch.Tensor, *, balanced: bool) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=balanced)
        loss = torch.nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), batch[:, 1:].flatten())
        return loss + BALANCE * outputs.aux_loss if balanced else loss

    def held_out_perplexity() -> float:
        rows = held[: len(held) // (SEQUENCE_LENGTH + 1) * (SEQUENCE_LENGTH + 1)].view(-1, SEQUENCE_LENGTH + 1)[:32]
        with torch.no_grad():
            return math.exp(sum(loss_of(each, balanced=False).item() for each in rows.split(8)) / len(rows.split(8)))

    started = time.time()
    for step in range(arguments.steps):
        starts = torch.randint(len(tokens) - SEQUENCE_LENGTH - 1, (BATCH_SIZE,))
        batch = torch.stack([tokens[s : s + SEQUENCE_LENGTH + 1] for s in starts])
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * warmup * cosine
        loss = loss_of(batch, balanced=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step} loss {loss.item():.3f} elapsed {time.time() - started:.0f} s", flush=True)
        if step % 100 == 99:
            print(f"step {step} held-out perplexity {held_out_perplexity():.2f}", flush=True)

    model.eval().to(torch.bfloat16).save_pretrained(arguments.out)
    for file in arguments.dense.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, arguments.out / file.name)


if __name__ == "__main__":
    main()
