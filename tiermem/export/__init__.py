"""Export: a directory of links through which any engine reads a model's weights in the pool with its own loader.

Owns the image that has the bytes of the weights files, and its pin; the layout of those files and the directory have
files of their own. Never reads a tensor from disk: the pool has loaded and verified them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from tiermem.checkpoint import check_unchanged, open_checkpoint
from tiermem.checkpoint.file import regular_file
from tiermem.checkpoint.formats import ENDINGS, INDEX_ENDING
from tiermem.checkpoint.layout import identity_of
from tiermem.client import Client
from tiermem.draft import Draft
from tiermem.errors import CheckpointChanged, ModelNotFound, Refused, TiermemError
from tiermem.export.directory import Note, check, claim, clear, digest_of, fill, leave, note_of
from tiermem.export.layout import INDEX_NAME, SAFETENSORS, WeightsFile, index_of, lay_out_files
from tiermem.model import Model
from tiermem.paths import default_name, path_or_name_of
from tiermem.types import ImageTensor, Manifest

_VERSION = "1"
"""Of the layout of exported files; another one makes other images."""
_INSTANCE = "tiermem.export"
"""Metadata of an image that tells it from another of the same fingerprint, made after it was lost."""
_COPY_THREADS = 2


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export made or found: `created` says whether its image is new. `weights` are names in the directory."""

    directory: str
    image: str
    form: str
    weights: tuple[str, ...]
    linked: int
    nbytes: int
    page_bytes: int
    created: bool


def export(client: Client, path_or_name: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Exported:
    """Make `directory` one whose weights files are links to segments of the client's pool, pinned until `undo`.

    Takes a checkpoint's path, which is loaded first, or the name of a model in the pool. safetensors, PyTorch and
    MindSpore checkpoints become safetensors files, GGUF stays as it is with zeros behind its end; whatever else lies in
    the checkpoint's directory is linked. Readers share the pool's memory, and what they write stays their own. Exported
    again, the links are made anew. The model itself leaves memory afterwards, if it was loaded for this alone.

    Raises Refused (no weights to share, a directory that no export made, segments that nobody else can map),
    AccessDenied, CapacityError (model and image are in memory together for a moment), CheckpointNotFound,
    ModelNotFound, CheckpointError, CheckpointChanged.
    """
    target = Path(os.path.abspath(directory))
    _check_pool(client)
    manifest = _manifest(client, path_or_name)
    form, files = lay_out_files(manifest)
    old = check(target, manifest.identity, client.address)
    contents = {INDEX_NAME: index_of(files)} if form == SAFETENSORS and len(files) > 1 else {}
    beside = _beside(manifest, {file.name.split("/")[0] for file in files} | contents.keys(), target)
    image, created = _image(client, manifest, form, files)
    try:
        with image:
            paths = client.share_paths(image.name)
            links = beside | dict(zip((file.name for file in files), paths, strict=True))
            digests = {name: digest_of(content) for name, content in contents.items()}
            made = old.made if old else not target.exists()
            instance = image.metadata[_INSTANCE]
            note = Note(manifest.path, manifest.identity, client.address, image.name, instance, links, digests, made)
            claim(target, note, old)
            if old is None or old.instance != instance:
                client.pin(image.name)
            fill(target, note, contents)
    except BaseException:
        if old is None:
            _give_up(client, target, image.name)
        raise
    weights = tuple(file.name for file in files)
    page_bytes = sum(file.page_bytes for file in files)
    return Exported(str(target), image.name, form, weights, len(beside), manifest.nbytes, page_bytes, created)


def undo(client: Client, directory: str | os.PathLike[str]) -> bool:
    """Remove what an export made in `directory`, and the image behind it once no other export has it pinned.

    True where nothing is left of the directory but what was there before; files that were put there since stay. Who
    reads the weights keeps them. Raises Refused where no export made the directory.
    """
    target = Path(os.path.abspath(directory))
    note = _note(target)
    if note.address != client.address:
        raise Refused(f"{target}: is an export from the pool at {note.address}, not {client.address}; undo it there")
    clear(target, note)
    _let_go(client, note)
    return leave(target, note)


def address_of(directory: str | os.PathLike[str]) -> str:
    """The address of the pool whose weights an export links to. Raises Refused where no export made it."""
    return _note(Path(os.path.abspath(directory))).address


def _give_up(client: Client, directory: Path, image: str) -> None:
    """Leave nothing of an export that failed."""
    with suppress(TiermemError):
        if note_of(directory) is not None:
            undo(client, directory)
        elif not client.status(image)["models"][0]["pins"]:
            client.remove(image)


def _note(directory: Path) -> Note:
    note = note_of(directory)
    if note is None:
        raise Refused(f"{directory}: was not made by an export; nothing of it is removed")
    return note


def _let_go(client: Client, note: Note) -> None:
    """Take the export's pin back, and remove the image after its last one."""
    try:
        with client.open(note.image) as image:
            is_ours = image.metadata.get(_INSTANCE) == note.instance
    except ModelNotFound:
        is_ours = False
    if is_ours:  # and not one that was made after a daemon that took ours with it
        with suppress(Refused):  # the pin was taken back already, or somebody reads it: eviction will do
            if not client.unpin(note.image):
                client.remove(note.image)


def _check_pool(client: Client) -> None:
    if not isinstance(client, Client):
        raise Refused("an export needs a daemon, which outlives this process; start one with: tiermem serve")
    if client.status()["pool"]["backing"] == "hugetlb":
        raise Refused(
            "engines cannot map files on reserved 2 MiB pages copy-on-write; serve with --backing tmpfs, or shm"
        )


def _manifest(client: Client, path_or_name: str | os.PathLike[str]) -> Manifest:
    """The checkpoint as its files are now, read from their headers: an image that exists needs no load."""
    path, name = path_or_name_of(path_or_name)
    if path is not None:
        return open_checkpoint(path)
    state = client.status(name)["models"][0]
    if state["fingerprint"]:
        raise Refused(f"{name} is an image, which has no files of its own; export the checkpoint that it was made of")
    manifest = open_checkpoint(state["path"])
    if manifest.identity != state["identity"]:
        raise CheckpointChanged(f"{state['path']}: is no longer what {name} was loaded from; export the path")
    return manifest


def _image(client: Client, manifest: Manifest, form: str, files: Sequence[WeightsFile]) -> tuple[Model, bool]:
    """The image with these files, a segment each, and whether it was made now."""
    names = "\n".join(file.name for file in files)
    fingerprint = {
        "kind": "export", "checkpoint": manifest.identity, "form": form, "version": _VERSION,
        "files": blake3(names.encode()).hexdigest(),
    }  # fmt: skip
    tensors = [ImageTensor(file.name, "U8", (file.page_bytes,), layer=file.name) for file in files]
    metadata = {_INSTANCE: secrets.token_hex(8)}
    found = client.create_image(fingerprint, tensors, name=f"{default_name(manifest)}.export", metadata=metadata)
    if isinstance(found, Model):
        return found, False
    with found as draft:
        before = {model["name"]: model["resident_bytes"] for model in client.status()["models"]}
        with client.open(manifest.path) as model:
            if identity_of(model.files) != manifest.identity:
                raise CheckpointChanged(f"{manifest.path}: changed while it was exported; export it again")
            for file in files:
                _write(file, model, draft)
            # Its files are looked at once more where a load ends.
            model.wait()
        if not before.get(model.name):
            with suppress(Refused):  # somebody reads it by now
                client.evict(model.name)
        return draft.seal(), True


def _write(file: WeightsFile, model: Model, draft: Draft) -> None:
    target = draft.raw(file.name)
    target[: len(file.header)] = file.header
    if file.gaps:
        with regular_file(file.source.path) as (descriptor, _):
            for start, end in file.gaps:
                _read(file.source.path, descriptor, target, start, end)
            check_unchanged(file.source, descriptor)
    for tensor, offset in file.tensors:
        if tensor.nbytes:
            model.copy_to(tensor.name, target[offset : offset + tensor.nbytes], _COPY_THREADS)


def _read(path: str, descriptor: int, target: memoryview, start: int, end: int) -> None:
    while start < end:
        count = os.preadv(descriptor, [target[start:end]], start)
        if not count:
            raise CheckpointChanged(f"{path}: shrank while it was exported; export it once it is at rest")
        start += count


def _beside(manifest: Manifest, taken: AbstractSet[str], target: Path) -> dict[str, str]:
    """Name -> path of what else lies in the checkpoint's directory: no weights of any format, nothing hidden.

    Of a checkpoint that was named by its one file, that is nothing.
    """
    root = os.path.dirname(manifest.path) if manifest.path.endswith(INDEX_ENDING) else manifest.path
    if not os.path.isdir(root):
        return {}
    with os.scandir(root) as entries:
        return {
            entry.name: entry.path
            for entry in entries
            if not (entry.name.startswith(".") or entry.name in taken or entry.path == str(target))
            and not entry.name.endswith((*ENDINGS, INDEX_ENDING))
        }
