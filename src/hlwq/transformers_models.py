"""Tokenizers and models without weights from transformers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hlwq.errors import CheckpointError, RequestError, ResourceError, UnsupportedError, reason, was_interrupted
from hlwq.files import lfs_pointer

TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")
CONVERTERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf", "tiktoken": "tiktoken"}
"""What transformers reads tokenizers with that have no `tokenizer.json`: packages, and the modules they bring."""


def _library() -> Any:
    """Transformers, imported by those who need it; its own types are too narrow for what it accepts."""
    return import_module("transformers")


def transformers_version() -> str:
    """The installed one."""
    return str(_library().__version__)


def model_types_of(architecture: str) -> tuple[str, ...]:
    """The values of `model_type` for which transformers builds this class of causal language models; maybe none."""
    from transformers.models.auto import modeling_auto

    mappings = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return tuple(dict.fromkeys(key for mapping in mappings for key, name in mapping.items() if name == architecture))


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a directory, without running code or reaching the network.

    Raises:
        ResourceError: a package is missing that the tokenizer's files need.
        CheckpointError: there is no tokenizer, or none that loads and gives tokens.
    """
    transformers = _library()
    files = [file for file in sorted(path.glob("*")) if file.suffix in TOKENIZER_SUFFIXES]
    if pointer := next((file for file in files if lfs_pointer(file)), None):
        message = f"{pointer} is a pointer of Git LFS, not the file itself. Run `git lfs pull` in {path}."
        raise CheckpointError(message, path=pointer)
    try:
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            tokenizer("The rain.")  # where special tokens are wrong, this fails
            if tokenizer("The rain.", add_special_tokens=False)["input_ids"]:
                return tokenizer
        why = "it has no vocabulary"  # what transformers makes where there is no file
    except BaseException as error:
        _let_interrupts_pass(error)
        if "trust_remote_code" in str(error):
            message = (
                f"{path}: the tokenizer is Python code of its own, which hlwq never runs. Save it as tokenizer.json."
            )
            raise CheckpointError(message, path=path) from None
        why = reason(error)
    if not (path / "tokenizer.json").is_file() and any(file.suffix in (".model", ".tiktoken") for file in files):
        _require_conversion(path)
    raise CheckpointError(f"{path} has no tokenizer that loads ({why}). Copy the original's.", path=path)


def _require_conversion(path: Path) -> None:
    """Raise ResourceError if a package is missing that reads `tokenizer.model` or `*.tiktoken` files."""
    missing = [package for package, module in CONVERTERS.items() if not _importable(module)]
    if missing:
        message = f"The tokenizer of {path} may need {', '.join(missing)}. Run: pip install 'hlwq[tokenizers]'"
        raise ResourceError(message, path=path)


def _importable(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text. Raises CheckpointError if the tokenizer fails."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    except BaseException as error:
        _let_interrupts_pass(error)
        message = f"The tokenizer fails on a text ({reason(error)}). Copy the original's."
        raise CheckpointError(message, path=getattr(tokenizer, "name_or_path", None)) from None
    return ids


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """A chat as the tokenizer's template writes it.

    Args:
        tokenizer: one that has a chat template.
        messages: each with `role` and `content`, and what else the template reads.
        options: of `apply_chat_template`: `tools`, `documents`, `add_generation_prompt`.

    Raises:
        CheckpointError: the template is not valid.
        RequestError: the template refuses the chat.
    """
    from jinja2 import TemplateSyntaxError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateSyntaxError as error:
        message = f"The model's chat template is not valid (line {error.lineno}: {reason(error)}). Copy the original's."
        raise CheckpointError(message, path=getattr(tokenizer, "name_or_path", None)) from None
    except Exception as error:  # a template raises what it likes
        _let_interrupts_pass(error)
        raise RequestError(f"The model's chat template refuses a chat: {reason(error)}.") from None
    return text


def _let_interrupts_pass(error: BaseException) -> None:
    """Raise it again if it ends the program: a panic of tokenizers' Rust code is no Exception, and must not."""
    if isinstance(error, SystemExit | GeneratorExit):
        raise error
    if was_interrupted(error):
        raise KeyboardInterrupt from error


def build_skeleton(config: dict[str, Any], *, tied: bool, dtype: torch.dtype | None = None) -> Any:
    """The causal language model of a `config.json`: all of its modules and none of its weights, which are on `meta`.

    Args:
        config: the parsed file.
        tied: the output head is the embedding.
        dtype: of the buffers that a model computes with, such as the scale of an embedding; by default the file's.

    Raises:
        UnsupportedError: it does not know the model.
    """
    transformers = _library()
    model_type = config.get("model_type")
    try:
        kind = type(transformers.AutoConfig.for_model(model_type))
    except (KeyError, ValueError):
        raise UnsupportedError(
            f"config.json: transformers {transformers.__version__} does not know model_type {model_type}. Upgrade "
            "transformers, or correct the file."
        ) from None
    try:
        parsed = kind.from_dict(_with_special_floats(config))
        parsed.validate()
        # The file may name a kernel of the hub, which transformers would download and run.
        parsed._attn_implementation = parsed._experts_implementation = None
        with quiet_transformers(), _WithoutWeights():
            auto = transformers.AutoModelForCausalLM
            if kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:  # a language model in a wrapper
                auto = transformers.AutoModelForImageTextToText
            skeleton = auto.from_config(parsed, trust_remote_code=False, **({} if dtype is None else {"dtype": dtype}))
    except Exception as error:  # of its checks, or of the model's own code
        _let_interrupts_pass(error)
        why = reason(error.__cause__ or error)  # a check of a whole configuration says only which it is
        message = f"config.json: transformers makes no {model_type} model of it ({why}). Correct the file."
        raise CheckpointError(message) from None
    skeleton.config.tie_word_embeddings = tied
    return skeleton.eval()


def _with_special_floats(value: Any) -> Any:
    """A part of a `config.json` with the floats that JSON has not, as transformers spells them there."""
    if isinstance(value, dict):
        if list(value) == ["__float__"]:
            return float(str(value["__float__"]))
        return {key: _with_special_floats(each) for key, each in value.items()}
    return [_with_special_floats(each) for each in value] if isinstance(value, list) else value


class _WithoutWeights(TorchFunctionMode):
    """Leaves out what modules would initialise as weights, which they allocate by `torch.empty`.

    Other tensors are made: buffers that no file holds, such as the scale of an embedding or the rotary frequencies, are
    then what the model's code says.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading bars, and its hints on long texts and on kernels that are not installed.

    It imports torchao where that is installed, which complains of a missing GPU.
    """
    transformers = _library()
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    others = {logger: logger.level for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))}
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in others.items():
            logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
