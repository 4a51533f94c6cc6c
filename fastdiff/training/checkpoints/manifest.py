"""A checkpoint's manifest: the size and SHA-256 of each of its files, in manifest.json."""

from __future__ import annotations

import json
from pathlib import Path

from fastdiff.runtime.files import checksum, sync_path, write_text

MANIFEST = "manifest.json"


def write_manifest(folder: Path, step: int) -> None:
    """Wait until all files in a folder are on disk, and write their manifest."""
    files = sorted(folder.iterdir())
    content = {"step": step, "files": {f.name: {"bytes": f.stat().st_size, "sha256": checksum(f)} for f in files}}
    for file in files:
        sync_path(file)
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def find_damage(checkpoint: Path) -> str:
    """Compare a checkpoint's files with its manifest, byte for byte; returns what is wrong, or an empty string.

    A folder without a manifest was written before manifests were introduced; it passes if it has a state.pt.
    """
    manifest = checkpoint / MANIFEST
    try:
        if not manifest.is_file():
            return "" if (checkpoint / "state.pt").is_file() else "it has no manifest.json"
        files = json.loads(manifest.read_text())["files"]
        for name, wanted in files.items():
            file = checkpoint / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != wanted["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {wanted['bytes']}"
            if checksum(file) != wanted["sha256"]:
                return f"{name} has another content than was written"
        return "" if "state.pt" in files else "manifest.json names no state.pt"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no manifest"
        return f"manifest.json can't be read ({reason})"
