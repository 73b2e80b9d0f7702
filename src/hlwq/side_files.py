"""Files beside the weights that go along unchanged: those on a list, and nothing else that lies in a directory.

Model directories collect secrets, logs, programs, pickles and the notes of other tools. None of these is copied, nor is
the source's `README.md`, which describes other files; its licence and languages go into the new card.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from hlwq.errors import CheckpointError
from hlwq.files import check_file, is_folder

ENGINE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "tokenizer.model.v[0-9]", "tokenizer.model.v[0-9]m[0-9]", "tekken.json"),
    *("spiece.model", "sentencepiece*.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "feature_extractor_config.json", "generation_config.json"),
)
"""Tokenizers, chat templates, processors, and how to generate."""
TERMS = ("LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "[Nn]otice*", "COPYING*", "USE_POLICY*")
"""What the model may be used for, in texts."""
PATTERNS = (*ENGINE_FILES, *TERMS)
"""The names of side files, as the shell writes patterns."""
TEXTS = ("", ".txt", ".md", ".rst")
"""Suffixes of terms."""
LARGEST = 256 << 20
"""Bytes; the largest tokenizers have some 35 MB."""
TEMPLATES = "additional_chat_templates"

_ORDINARY_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_side_file(name: str) -> bool:
    """Whether a file of this name, its path inside a directory with `/`, goes along with the weights."""
    path = PurePosixPath(name)
    if not all(_ORDINARY_NAME.fullmatch(part) for part in path.parts):
        return False
    if any(fnmatchcase(name, pattern) for pattern in ENGINE_FILES):
        return True
    return (
        len(path.parts) == 1 and path.suffix.lower() in TEXTS and any(fnmatchcase(name, pattern) for pattern in TERMS)
    )


def side_files(directory: Path) -> dict[str, Path]:
    """The side files of a directory, by their paths inside it.

    Raises:
        CheckpointError: one cannot go along; see `own_file`. It is too large to be what its name says, perhaps.
    """
    found = {}
    try:
        files = sorted([*directory.iterdir(), *_templates(directory)])
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}.", path=directory) from None
    for file in files:
        name = file.relative_to(directory).as_posix()
        if not is_side_file(name) or is_folder(file):
            continue
        found[name] = own_file(file, directory)
        if (size := found[name].stat().st_size) > LARGEST:
            message = f"{file} has {size:,} bytes, which is more than such a file ever has. Delete it or move it."
            raise CheckpointError(message, path=file)
    return found


def left_behind(directory: Path) -> list[str]:
    """The names of the files in a directory that are neither weights nor side files nor written anew."""
    weights = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
    anew = ("config.json", "hlwq.json", "README.md", ".gitattributes")
    names = (file.name for file in sorted(directory.iterdir()) if not is_folder(file))
    return [printable(name) for name in names if not (is_side_file(name) or name.endswith(weights) or name in anew)]


def own_file(file: Path, directory: Path) -> Path:
    """The regular file that a name in a directory stands for.

    Symbolic links are followed inside the directory, and from a snapshot of the hub's cache to the cache's blobs.

    Args:
        file: in the directory.
        directory: where links may lead.

    Returns:
        Its real path.

    Raises:
        CheckpointError: it is a link that leads elsewhere or nowhere, or cannot be read; see `check_file`.
    """
    shown, root = printable(str(file)), Path(os.path.realpath(directory))
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # the latter for a loop
        why = getattr(error, "strerror", None) or "it is a loop"
        what = f"is a link that cannot be followed: {why}. Delete it" if file.is_symlink() else "is missing"
        raise CheckpointError(f"{shown} {what}.", path=file) from None
    if not target.is_relative_to(root) and not _in_hub_cache(target, root):
        raise CheckpointError(
            f"{shown} leads out of its directory, to {printable(str(target))}, and such links are not followed. "
            "Put a copy of the file in its place, or delete it.",
            path=file,
        )
    check_file(target)
    return target


def printable(text: str) -> str:
    """A name in one line, with question marks for what would control a terminal or has no form in UTF-8."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _templates(directory: Path) -> list[Path]:
    """What lies in `additional_chat_templates`. Raises CheckpointError if that is a link that leads elsewhere."""
    folder = directory / TEMPLATES
    if not is_folder(folder):
        return []
    if not folder.resolve().is_relative_to(os.path.realpath(directory)):
        message = f"{folder} leads out of its directory, and such links are not followed. Delete it."
        raise CheckpointError(message, path=folder)
    return list(folder.iterdir())


def _in_hub_cache(target: Path, snapshot: Path) -> bool:
    """Whether a file is a blob of the cache that a snapshot belongs to: its repository's, or one that all share."""
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    stores = (repository / "blobs", repository.parent / "blobs")
    return bool(_BLOB.fullmatch(target.name)) and any(target.is_relative_to(store) for store in stores)
