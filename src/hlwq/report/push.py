"""Publishing a checkpoint on the hub: the files that belong to it, once they are checked, and no others."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

from hlwq.check import check_directory, refuse_unless_usable
from hlwq.containers import Reader
from hlwq.containers.reader import INDEX
from hlwq.errors import CheckpointError, RequestError, ResourceError, reason
from hlwq.files import expanded, is_file, is_folder, read_json
from hlwq.provenance import is_hub_id, read_card
from hlwq.report.card import CARD, CHARTS
from hlwq.report.markdown import inline
from hlwq.side_files import TEMPLATES, own_file, printable, side_files
from hlwq.version import __version__

OWN = ("config.json", "hlwq.json", "quantize_config.json", "polar_config.json", "hlwq_config.json", CARD)
"""What hlwq writes or reads beside weights and side files."""
STAYING = ("results", CHARTS, "journal.jsonl", "arguments.json", ".cache", ".git", ".gitattributes", ".gitignore")
"""What is known, but not sent: measurements, records of a run, of a download, of git; and charts that the card does not
show."""

LARGEST_CARD = 1 << 24
"""Bytes."""

_SHOWN = re.compile(rf"\({CHARTS}/(\w[\w.-]*\.png)\)", re.ASCII)


@dataclass(frozen=True)
class Upload:
    """What `push` sends.

    Attributes:
        files: by their paths on the hub, which are those inside the directory.
        staying: names of what lies beside them, is known, and is not sent.
    """

    files: dict[str, Path]
    staying: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: file.stat().st_size for name, file in self.files.items()}


def prepare_push(
    directory: str | Path, repository: str, *, progress: Callable[[int, int, str], None] | None = None
) -> Upload:
    """Check a checkpoint and its card, and say which files `push` would send. Nothing is sent.

    Args:
        directory: the checkpoint.
        repository: the hub id that it will have.
        progress: told how many bytes of the weights are read.

    Raises:
        RequestError: there is no card, or it is of another repository; or the directory holds what is not known to be
            part of a checkpoint.
        CheckpointError: a file is damaged, or a link that leads out of the directory.
        UnsupportedError: no engine would load it.
    """
    path = expanded(directory)
    check_card(path, repository)
    upload = files_to_push(path)
    for name, file in upload.files.items():
        if name.endswith(".json"):
            read_json(file)
    refuse_unless_usable(check_directory(path, progress))
    return upload


def push(directory: str | Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Check a checkpoint, upload what belongs to it, and return its address: `prepare_push`, then `send`."""
    return send(prepare_push(directory, repository), repository, private=private, api=api)


def send(upload: Upload, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload files to the hub in one commit, and return the repository's address.

    Of what is there already, files of the same names are replaced, and shards and the index of an earlier upload are
    deleted, since engines would load them along with these.

    Args:
        upload: what `prepare_push` found.
        repository: the hub id; made if need be.
        private: make it for yourself alone.
        api: client of another hub than the usual one.

    Raises:
        ResourceError: the hub refuses.
    """
    hub = api or HfApi()
    try:
        url = hub.create_repo(repository, private=private, exist_ok=True)
        if private and not hub.repo_info(repository).private:
            raise ValueError("it is there already, and public. Make it private on its page first")
        gone = stale(hub.list_repo_files(repository), upload.files)
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in upload.files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in gone),
        ]
        hub.create_commit(repository, operations, commit_message=f"Quantized by hlwq {__version__}")
    except Exception as error:  # of the network, of the hub, of the token
        message = f"The hub did not take {repository}: {reason(error)}. Check the network, and `hf auth login`."
        raise ResourceError(message) from None
    return str(url)


def check_card(directory: Path, repository: str) -> None:
    """Check that a directory has a card under the name that it will have on the hub.

    Raises:
        RequestError: the name is none, or there is no card, or it has another name.
        CheckpointError: the card cannot be read.
    """
    if not is_hub_id(repository) or "/" not in repository:
        message = f"`repository` {printable(repository)} is no hub id. Write it like me/Qwen3.5-9B-INT4."
        raise RequestError(message)
    file = directory / CARD
    again = f"hlwq card {shlex.quote(str(directory))} --repository {repository}"
    if not is_file(file):
        raise RequestError(f"{directory} has no model card. Write one: {again}", path=directory)
    read_card(directory)
    if f"\n# {inline(repository)}\n" not in _text_of(file, directory):
        raise RequestError(
            f"{file} does not call it {repository}, as its commands must. Write it anew: {again} --overwrite",
            argument="repository",
            path=file,
        )


def files_to_push(directory: Path) -> Upload:
    """Find the files of a checkpoint, and account for everything else in its directory.

    Raises:
        RequestError: something in the directory is not known to be part of a checkpoint.
        CheckpointError: a file is a link that leads out of the directory, or is missing.
    """
    weights = _weights(directory)
    names = [*weights, *(name for name in OWN if is_file(directory / name))]
    names += [f"{CHARTS}/{name}" for name in sorted(set(_SHOWN.findall(_text_of(directory / CARD, directory))))]
    files = {name: own_file(directory / name, directory) for name in names} | side_files(directory)
    present = [*directory.iterdir()]
    if is_folder(directory / TEMPLATES):
        present += (directory / TEMPLATES).iterdir()
    found = {file.relative_to(directory).as_posix() for file in present} - {TEMPLATES}
    if unknown := sorted(found - files.keys() - set(STAYING)):
        shown = ", ".join(map(printable, unknown[:3])) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise RequestError(
            f"{directory} holds {shown}, which is not known to be part of a checkpoint and will not be published. "
            "Delete it or move it.",
            argument="directory",
            path=directory,
        )
    sent = {name.partition("/")[0] for name in files}
    return Upload(dict(sorted(files.items())), tuple(sorted(found.intersection(STAYING) - sent)))


def stale(remote: Iterable[str], uploaded: Collection[str]) -> list[str]:
    """Of the files on the hub, the shards and the index that are not uploaded again; only at the top level."""
    shards = (name for name in remote if "/" not in name and (fnmatchcase(name, "model*.safetensors") or name == INDEX))
    return [name for name in shards if name not in uploaded]


def _weights(directory: Path) -> list[str]:
    """The weight files that are read, and their index. Raises CheckpointError if that names others."""
    weights = sorted(Reader(directory).stamps())
    index = directory / INDEX
    if not is_file(index):
        return weights
    if set(read_json(index)["weight_map"].values()) != set(weights):
        raise CheckpointError(f"{index} does not name the weights that are there. Delete it.", path=index)
    return [*weights, INDEX]


def _text_of(file: Path, directory: Path) -> str:
    """The text of a card. Raises CheckpointError if it is none."""
    own = own_file(file, directory)
    if own.stat().st_size > LARGEST_CARD:
        raise CheckpointError(f"{file} is too large for a card. Write it anew.", path=file)
    try:
        return own.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 ({error}). Write it anew.", path=file) from None
