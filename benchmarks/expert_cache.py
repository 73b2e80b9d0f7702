"""Tokens per second and memory where experts do not fit: our cache, transformers' disk offload, a mapping of the file.

    python benchmarks/expert_cache.py MODEL
    python benchmarks/expert_cache.py

Without a MODEL: random weights, 4 layers of 64 experts in the shape of Qwen3-30B-A3B's. Its experts are quantized to 4
bits. Each line is a process of its own, which reads a text token by token. Before each token what the system holds of
the files is dropped, or every read would come from memory; the mapping's pages are dropped with it. Linux.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experts_layer import make_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import hlwq
from hlwq.containers import Reader
from hlwq.demo import held_out_text
from hlwq.devices import peak_memory
from hlwq.expert_store import ExpertStore
from hlwq.integrations.transformers import HLWQConfig
from hlwq.linear import HLWQExperts
from hlwq.transformers_models import encode, load_tokenizer, quiet_transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a BF16 checkpoint with experts")
    parser.add_argument("--capacities", type=int, nargs="+", help="by default 1, k, 1/4, 1/2, 3/4 and all")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--experts", type=int, default=64, help="of the random model")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(Path(options.model), options.run, options.prompt_tokens, options.new_tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        packed, random = Path(folder) / "packed", Path(folder) / "random"
        source = Path(options.model) if options.model else make_model(random, options.experts, options.layers)
        hlwq.quantize(source, packed, "hlwq", bits=4, include_embeddings=False)
        store = ExpertStore(Reader(packed))
        count, layers = max(store.counts.values()), len(store.counts)
        config = json.loads((source / "config.json").read_text())
        each = config.get("text_config", config)["num_experts_per_tok"]
        usual = sorted({1, each, count // 4, count // 2, 3 * count // 4, count})
        runs: list[tuple[str, Path, str, int | None]] = [
            ("BF16, transformers' disk offload", source, "disk:0", None),
            ("BF16, disk offload of 3/4 of the layers", source, f"disk:{layers // 4}", None),
            ("4 bits, transformers' disk offload", packed, "disk:0", None),
            ("4 bits, disk offload of 3/4 of the layers", packed, f"disk:{layers // 4}", None),
            ("4 bits, mapped", packed, "mapped", None),
        ]
        for capacity in options.capacities or usual:
            runs.append((f"4 bits, cache of {capacity} of {count}", packed, str(capacity), capacity))
            if capacity < count:
                runs.append(("  and read ahead", packed, f"{capacity}:ahead", capacity))
        runs += [("4 bits, in memory", packed, "memory", None)]
        table = Table("experts", "tokens/s", "× offload", "hits", "read/token", "waited", "peak", "of it cache + 2")
        first = None
        for title, directory, how, capacity in track(runs, "measuring", console=Console(stderr=True)):
            words = [sys.executable, __file__, str(directory), "--run", how]
            words += ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
            measured = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            first = first or measured["rate"]
            cells = [title, f"{measured['rate']:.2f}", f"{measured['rate'] / first:.1f}", "", "", ""]
            if "hits" in measured:
                uses = measured["hits"] + measured["misses"]
                cells[3] = f"{measured['hits'] / uses:.1%}"
                cells[4] = f"{measured['nbytes'] / options.new_tokens / 1e6:.2f} MB"
                cells[5] = f"{measured['seconds'] / measured['took']:.0%}"
            ours = "" if capacity is None else f"{(capacity * layers + 2) * store.nbytes / 1e6:,.1f} MB"
            table.add_row(*cells, f"{measured['peak'] / 1e6:,.1f} MB", ours)
        Console(width=140).print(table)
    print(f"{layers} layers of {count} experts of {store.nbytes / 1e6:.3f} MB, {each} of them for each token.")


def run(directory: Path, how: str, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """One line: the model is loaded, and generates."""
    files = list(directory.glob("*.safetensors"))
    maps: list[mmap.mmap] = []
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        said: dict[str, Any] = {}
        how, _, kept = how.partition(":")
        if how == "disk":
            said = {"device_map": on_disk(directory, kept), "offload_folder": folder}
        elif how.isdecimal():
            ahead = True if kept else None
            said = {"quantization_config": HLWQConfig(expert_cache=int(how), expert_prefetch=ahead)}
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **said)
        if how == "mapped":
            maps = map_experts(model, directory)
        if how == "memory":  # as they are loaded they are mapped too
            for module in model.modules():
                if isinstance(module, HLWQExperts):
                    module.packed = torch.nn.Parameter(module.get_parameter("packed").clone(), requires_grad=False)
        files += [file for file in Path(folder).rglob("*") if file.is_file()]

        def drop(*_: Any) -> None:
            for each in maps:
                each.madvise(mmap.MADV_DONTNEED)
            if how != "memory":
                for file in files:
                    handle = os.open(file, os.O_RDONLY)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(handle)

        model.register_forward_pre_hook(drop)
        ids = encode(load_tokenizer(directory), held_out_text().read_text(encoding="utf-8"))
        ids = ids[: prompt_tokens + new_tokens]
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            past = model(prompt[:, :prompt_tokens], use_cache=True).past_key_values
            cache = getattr(model, "expert_cache", None)
            before = vars(cache.counters).copy() if cache else {}
            since = time.perf_counter()
            for token in prompt[0, prompt_tokens:]:
                past = model(token[None, None], past_key_values=past, use_cache=True).past_key_values
            took = time.perf_counter() - since
    counted = {name: getattr(cache.counters, name) - value for name, value in before.items()}
    return {"rate": new_tokens / took, "took": took, "peak": peak_memory(), **counted}


def on_disk(directory: Path, kept: str) -> dict[str, str]:
    """The device map that leaves the experts of all layers but the first on disk."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    devices, experts = {}, [name for name, _ in model.named_modules() if name.endswith(".experts")]

    def place(name: str, module: torch.nn.Module) -> None:
        if name in experts:
            devices[name] = "cpu" if experts.index(name) < int(kept) else "disk"
        elif any(each.startswith(f"{name}.") for each in experts):
            for child, inside in module.named_children():
                place(f"{name}.{child}", inside)
        else:
            devices[name] = "cpu"

    for name, module in model.named_children():
        place(name, module)
    return devices


def map_experts(model: Any, directory: Path) -> list[mmap.mmap]:
    """Put mappings of a file in the place of experts that were read."""
    reader, maps = Reader(directory), []
    modules = {name: each for name, each in model.named_modules() if isinstance(each, HLWQExperts)}
    stacks = ExpertStore(reader).counts
    for (name, module), stack in zip(modules.items(), stacks, strict=True):
        assert name.split("layers.")[1] == stack.split("layers.")[1]
        matrix = next(each for each in reader.tensors if each.startswith(f"{stack}.0."))
        file, offset = reader.place(matrix)
        with file.open("rb") as stream:
            maps.append(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
        nbytes = module.count * module.shape.nbytes
        rows = np.frombuffer(maps[-1], dtype=np.uint8, count=nbytes, offset=offset).reshape(module.count, -1)
        module.packed = torch.nn.Parameter(torch.from_numpy(rows), requires_grad=False)
    return maps


if __name__ == "__main__":
    main()
