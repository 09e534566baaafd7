"""A list of a folder's files with sizes and hashes, written last: the folder is complete exactly if it matches."""

import hashlib
from pathlib import Path

from flashmhf.files import flush, read_json, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Flushes every file in `folder` to the disk, then writes the manifest atomically."""
    entries = {}
    for name, file in _files(folder).items():
        flush(file)
        entries[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    for inner in sorted({file.parent for file in _files(folder).values()}):
        flush(inner)
    write_json(folder / MANIFEST, {"files": entries})


def check(folder: Path, *, contents: bool = True) -> str | None:
    """How `folder` differs from its manifest, naming a file, or None if it does not.

    Args:
        folder: a missing manifest is a difference, too.
        contents: compare hashes, not only names and sizes.
    """
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        entries = {
            name: (entry["size"], entry["sha256"]) for name, entry in read_json(folder / MANIFEST)["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is corrupt"
    files = _files(folder)
    if missing := sorted(entries.keys() - files.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(files.keys() - entries.keys()):
        return f"{extra[0]} is not in its {MANIFEST}"
    for name, (size, sha256) in entries.items():
        try:
            if files[name].stat().st_size != size:
                return f"{name} has {files[name].stat().st_size} bytes instead of {size}"
            if contents and _sha256(files[name]) != sha256:
                return f"{name} does not have the sha256 it was written with"
        except OSError as error:  # a broken disk
            return f"{name} cannot be read ({error.strerror})"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` except the manifest, by relative name."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if name != MANIFEST}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
