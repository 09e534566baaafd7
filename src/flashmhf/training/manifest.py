"""A list of a folder's files with sizes and hashes, written last: the folder is whole exactly if the list fits it."""

import hashlib
import json
from pathlib import Path

from flashmhf.files import flush, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Flushes every file in `folder` to the disk, then writes the manifest beside, flushes and renames it."""
    entries = {}
    for name, file in _files(folder).items():
        flush(file)
        entries[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    for inner in sorted({file.parent for file in _files(folder).values()}):
        flush(inner)
    write_json(folder / MANIFEST, {"files": entries})


def check(folder: Path, *, contents: bool = True) -> str | None:
    """Why `folder` is not what its manifest says, naming a file, or None.

    Args:
        folder: with a manifest, or without, which is a reason.
        contents: read every file and compare its hash, beyond names and sizes.
    """
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        entries = {
            name: (entry["size"], entry["sha256"])
            for name, entry in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is torn"
    files = _files(folder)
    if missing := sorted(entries.keys() - files.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(files.keys() - entries.keys()):
        return f"{extra[0]} is not in its {MANIFEST}"
    for name, (size, sha256) in entries.items():
        if files[name].stat().st_size != size:
            return f"{name} has {files[name].stat().st_size} bytes in place of {size}"
        if contents and _sha256(files[name]) != sha256:
            return f"{name} has another sha256 than when it was written"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` but the manifest, by its name there."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if name not in (MANIFEST, MANIFEST + ".tmp")}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
