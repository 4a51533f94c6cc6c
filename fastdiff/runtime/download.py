"""Downloads a file once into a folder that processes and later runs share."""

from __future__ import annotations

import http.client
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from tqdm import tqdm

from fastdiff.errors import UserError
from fastdiff.runtime.files import FileLock, atomic_write, partial_path, remove_partial_files


def download(url: str, file: Path, check: Callable[[Path], object], advice: str, progress: bool = True) -> Path:
    """Return `file`; downloads it from the URL first if it is missing. Only one process at a time does so.

    check   raises UserError for a file whose content is wrong or incomplete; that file is not kept.
    advice  the end of the UserError that is raised if the download fails.
    """
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.parent / ".lock"):
            if not file.is_file():
                remove_partial_files(file.parent)
                _fetch(url, file, check, progress)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise UserError(f"{url} can't be fetched into {file.parent} ({reason}); {advice}") from error
    return file


def _fetch(url: str, file: Path, check: Callable[[Path], object], progress: bool) -> None:
    if progress:
        print(f"fetching {url} to {file}", file=sys.stderr, flush=True)
    with atomic_write(file) as target, urlopen(url) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm.wrapattr(response, "read", total=total, disable=not progress) as source:
            shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        try:
            check(partial_path(file))  # a broken connection leaves a truncated file
        except UserError:
            raise OSError("the download is incomplete") from None
