"""What each engine demands of a directory, checked on the files as they lie there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hlwq.checkpoint import Reader
from hlwq.errors import HlwqError
from hlwq.formats import StoredModule, gptq, mlx
from hlwq.formats.compressed_tensors import configured_weights, scheme_in
from hlwq.formats.uniform import GROUP_SIZES
from hlwq.models import ModelLayout, describe
from hlwq.models.qwen3_5 import QWEN3_5, layer_types
from hlwq.sources import ENGINE_SECTIONS, DecodedCheckpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class CheckLine:
    """One demand of one engine.

    Attributes:
        engine: who demands it.
        requirement: what is demanded.
        passed: whether the directory meets it.
        detail: what was found, where it does not.
        remedy: what to do about it.
    """

    engine: str
    requirement: str
    passed: bool
    detail: str = ""
    remedy: str = ""


def check_directory(path: str | Path) -> list[CheckLine]:
    """Check a model directory against the engines that read its format.

    Args:
        path: a directory of any format.

    Returns:
        One line for each demand, engine by engine.

    Raises:
        HlwqError: the directory is damaged, or of a format that cannot be read.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise HlwqError(f"{directory} is not a directory.")
    reader = Reader(directory)
    decoded = DecodedCheckpoint(directory)
    modules = decoded.format.stored_modules(reader)
    layout = describe(decoded.config, decoded.tensors)
    lines = [_tokenizer(reader), _complete(decoded, layout)]
    engines: dict[str, Callable[[Reader, ModelLayout, dict[str, StoredModule]], Iterable[CheckLine]]] = {
        "gptq": _check_gptq,
        "compressed-tensors": _check_compressed_tensors,
        "mlx": _check_mlx,
        "hlwq": _check_hlwq,
        "polar": _check_polar,
        "dense": _check_dense,
    }
    lines += engines[decoded.format.NAME](reader, layout, modules)
    # What all engines demand is demanded by each.
    names = dict.fromkeys(line.engine for line in lines if line.engine != "all engines")
    return [
        CheckLine(engine, line.requirement, line.passed, line.detail, line.remedy)
        for engine in names
        for line in lines
        if line.engine in ("all engines", engine)
    ]


def _line(engine: str, requirement: str, offenders: Iterable[str], remedy: str) -> CheckLine:
    found = list(offenders)
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return CheckLine(engine, requirement, not found, shown + "." if found else "", remedy if found else "")


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds any of the files that tokenizers load from."""
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def _tokenizer(reader: Reader) -> CheckLine:
    missing = [] if has_tokenizer(reader.path) else ["none of " + ", ".join(TOKENIZER_FILES)]
    return _line("all engines", "a tokenizer lies beside the weights", missing, "Copy it from the original model.")


def _complete(decoded: DecodedCheckpoint, layout: ModelLayout) -> CheckLine:
    wrong = [
        name
        for name, shape in layout.required_tensors().items()
        if name not in decoded.tensors or decoded.tensors[name].shape != shape
    ]
    return _line(
        "all engines", "every tensor of the model is there, in its shape", wrong, "Quantize the original again."
    )


def _check_gptq(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[CheckLine]:
    section = reader.config["quantization_config"]
    vllm, gptqmodel = "vLLM", "GPTQModel"
    again = "Quantize again with the defaults of format gptq."
    asymmetric = [] if section.get("sym") else ["sym is false"]
    ordered = ["desc_act is true"] if section.get("desc_act") else []
    return [
        _line(vllm, "symmetric", asymmetric, "Quantize again with --symmetric, or serve it with GPTQModel."),
        _line(vllm, "desc_act is false", ordered, again),
        *_uniform_in_vllm(layout, modules, again),
        _line(
            vllm,
            "dynamic rules agree with the tensors, by fused names",
            _wrong_rules(section, layout, modules, True),
            again,
        ),
        _line(
            gptqmodel,
            "dynamic rules agree with the tensors, by own names",
            _wrong_rules(section, layout, modules, False),
            again,
        ),
        _line(gptqmodel, "zeros, scales and group indices for every module", _without_index(reader, modules), again),
    ]


def _check_compressed_tensors(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[CheckLine]:
    section = reader.config["quantization_config"]
    again = "Quantize again with the defaults of format compressed-tensors."
    rule = "config_groups and ignore agree with the tensors"
    return [
        *_uniform_in_vllm(layout, modules, again),
        _line("vLLM", f"{rule}, by its names", _wrong_targets(section, layout, modules, True), again),
        _line("transformers", f"{rule}, by own names", _wrong_targets(section, layout, modules, False), again),
    ]


def _uniform_in_vllm(layout: ModelLayout, modules: dict[str, StoredModule], again: str) -> list[CheckLine]:
    """What vLLM demands of uniform codes in any format."""
    bits = {f"{m.scheme.bits} bits" for m in modules.values() if m.scheme.bits not in gptq.BITS}
    groups = [
        f"{name} (group {m.scheme.group_size})" for name, m in modules.items() if m.scheme.group_size not in GROUP_SIZES
    ]
    uneven = [f"{name} {m.shape}" for name, m in modules.items() if m.shape[0] % 32 or m.shape[1] % 32]
    return [
        _line("vLLM", "4 or 8 bits (4 on a CPU)", sorted(bits), again),
        _line("vLLM", "groups of 32, 64 or 128", groups, "Quantize again with --group-size 64."),
        _line("vLLM", "in and out divisible by 32", uneven, "Quantize again and --exclude them."),
        _line("vLLM", "fused matrices have one scheme", _mixed_fusions(layout, modules), again),
    ]


def _wrong_targets(
    section: dict[str, Any], layout: ModelLayout, modules: dict[str, StoredModule], vllm: bool
) -> list[str]:
    """Modules for which `config_groups` and `ignore` say something else than the tensors do."""
    wrong = []
    for index, layer in enumerate(layout.layers):
        prefix = layout.layer_prefix(index)
        for matrix in layer.matrices():
            asked = prefix + matrix.name
            if vllm:  # which asks with the parts' names of a fused matrix, and swaps the wrapper's two prefixes
                asked = re.sub(r"^model\.language_model\.", "language_model.model.", asked)
            stored = modules.get(prefix + matrix.name)
            weights = configured_weights(section, asked)
            if weights and stored:
                agrees = scheme_in(weights, stored.shape[1]) == stored.scheme
            else:
                agrees = weights is None and stored is None
            if not agrees:
                wrong.append(asked)
    outside = ["lm_head"]
    for kept in layout.family.kept:
        outside.append(f"{kept.removeprefix('model.') if vllm else kept}blocks.0.mlp.linear_fc1")
    return wrong + [name for name in outside if configured_weights(section, name) is not None]


def _mixed_fusions(layout: ModelLayout, modules: dict[str, StoredModule]) -> list[str]:
    schemes: dict[str, set[Any]] = {}
    for index, layer in enumerate(layout.layers):
        prefix = layout.layer_prefix(index)
        for matrix in layer.matrices():
            if matrix.fused:
                stored = modules.get(prefix + matrix.name)
                schemes.setdefault(prefix + matrix.fused, set()).add(stored.scheme if stored else None)
    return [fused for fused, found in schemes.items() if len(found) > 1]


def _wrong_rules(
    section: dict[str, Any], layout: ModelLayout, modules: dict[str, StoredModule], fused: bool
) -> list[str]:
    """Modules for which the `dynamic` rules say something else than the tensors do."""
    rules = section.get("dynamic") or {}
    wrong = []
    for index, layer in enumerate(layout.layers):
        prefix = layout.layer_prefix(index)
        for matrix in layer.matrices():
            asked = prefix + (matrix.fused or matrix.name if fused else matrix.name)
            if fused:  # vLLM swaps the wrapper's two prefixes
                asked = re.sub(r"^model\.language_model\.", "language_model.model.", asked)
            stored = modules.get(prefix + matrix.name)
            rule = _first_rule(rules, asked)
            if stored is None:
                agrees = rule is False
            else:
                chosen = {**section, **rule} if isinstance(rule, dict) else section
                size = chosen["group_size"] if chosen["group_size"] != -1 else stored.shape[1]
                agrees = rule is not False and (chosen["bits"], size) == (stored.scheme.bits, stored.scheme.group_size)
            if not agrees:
                wrong.append(asked)
    outside = ["lm_head"]
    for kept in layout.family.kept:  # vLLM says `visual.…` where the checkpoint says `model.visual.…`
        outside.append(f"{kept.removeprefix('model.') if fused else kept}blocks.0.mlp.linear_fc1")
    wrong += [each for each in outside if each not in modules and _first_rule(rules, each) is not False]
    return wrong


def _first_rule(dynamic: dict[str, Any], name: str) -> dict[str, Any] | bool | None:
    """The first rule that matches, False for an exclusion: as vLLM and GPTQModel read them."""
    for pattern, rule in dynamic.items():
        if re.match(re.sub(r"^[-+]:", "", pattern), name):
            return False if pattern.startswith("-:") else dict(rule)
    return None


def _without_index(reader: Reader, modules: dict[str, StoredModule]) -> list[str]:
    return [module for module in modules if f"{module}.g_idx" not in reader.tensors]


def _check_mlx(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[CheckLine]:
    engine = "mlx-lm"
    again = "Quantize again with --format mlx."
    names = [file.name for file in reader.path.glob("*.safetensors") if not file.name.startswith("model")]
    bits = [f"{m} ({s.scheme.bits} bits)" for m, s in modules.items() if s.scheme.bits not in mlx.BITS]
    groups = [
        f"{m} (group {s.scheme.group_size})" for m, s in modules.items() if s.scheme.group_size not in GROUP_SIZES
    ]
    config = reader.config
    text = config.get("text_config") or config
    # mlx-lm's own default differs from family to family.
    untold = [] if text.get("tie_word_embeddings") is layout.tied else ["tie_word_embeddings"]
    lines = [
        _line(engine, "weight files are called model*.safetensors", names, "Rename them."),
        _line(engine, "2, 3, 4, 5, 6 or 8 bits", bits, again),
        _line(engine, "groups of 32, 64 or 128", groups, again),
        _line(engine, "config.json says whether embeddings are tied", untold, again),
    ]
    if layout.family is not QWEN3_5:
        unread = list(mlx.rope_as_before(config))
        lines.append(_line(engine, "rope_theta and rope_scaling stand at the top level", unread, again))
    else:
        interval = text.get("full_attention_interval", 4)
        full = [kind == "full_attention" for kind in layer_types(text)]
        odd = [f"layer {i}" for i, is_full in enumerate(full) if is_full != ((i + 1) % interval == 0)]
        wrong_type = [] if config.get("model_type") == "qwen3_5" else [str(config.get("model_type"))]
        lines += [
            _line(engine, "full attention in every layer of the interval", odd, "mlx-lm cannot run this model."),
            _line(engine, "model_type is qwen3_5", wrong_type, again),
        ]
    return lines


def _check_hlwq(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[CheckLine]:
    again = "Quantize again with --recipe hlwq."
    transformers, vllm = "transformers", "vLLM with hlwq"
    whole, index = "model.safetensors", "model.safetensors.index.json"
    unnamed = [] if any((reader.path / name).is_file() for name in (whole, index)) else [f"neither {whole} nor {index}"]
    untyped = [] if reader.config.get("model_type") else ["model_type"]
    packed = [layout.embedding] if layout.family is QWEN3_5 and layout.embedding in modules else []
    return [
        _line(transformers, f"weights are in {whole}, or named by {index}", unnamed, again),
        _line(transformers, "config.json says the model's type", untyped, "Copy it from the original's config.json."),
        _line(vllm, "fused matrices have one scheme", _mixed_fusions(layout, modules), again),
        _line(vllm, "the embedding of Qwen3.5 is as it was", packed, "Quantize again without --include-embeddings."),
    ]


def _check_polar(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[CheckLine]:
    known = layout.required_tensors()
    strange = [module for module in modules if f"{module}.weight" not in known]
    return [_line("hlwq", "every coded matrix is one of the model's", strange, "Convert another copy.")]


def _check_dense(reader: Reader, layout: ModelLayout, modules: dict[str, StoredModule]) -> list[CheckLine]:
    sections = [key for key in ENGINE_SECTIONS if reader.config.get(key)]
    return [_line("transformers", "config.json names no quantization", sections, "Remove that section.")]
