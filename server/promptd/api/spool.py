"""Bodies of uploads on their way in: in memory while they are small, then in a file without a name.

Such a file is gone with whoever has it open: when its request ends, however it ends, and when the process is killed.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from promptd_store import Content
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from promptd.api.json_body import StrictJsonRequest
from promptd.errors import OverloadedError

MAX_IN_MEMORY = MultiPartParser.spool_max_size


def open_spool(folder: Path | None) -> BinaryIO:
    """Open an empty one in a folder; where none is given in the system's for such files."""
    return cast(BinaryIO, tempfile.SpooledTemporaryFile(MAX_IN_MEMORY, dir=None if folder is None else str(folder)))


def content_of(upload: UploadFile) -> Content:
    """Return what was written; of a file a map, which outlives its closing.

    Nobody else can reach that file, so nobody cuts it short under the map.
    """
    size = upload.size or 0
    if size <= MAX_IN_MEMORY:
        upload.file.seek(0)
        return upload.file.read()
    return memoryview(mmap.mmap(upload.file.fileno(), size, access=mmap.ACCESS_COPY))  # writable: tensors lie on it


@contextmanager
def spooling() -> Iterator[None]:
    """Around what writes such files: raises `OverloadedError` where the disk takes no more."""
    try:
        yield
    except OSError as error:
        raise OverloadedError(f"uploads cannot be written here now: {error.strerror}", code="no_room") from error


class SpoolingRequest(StrictJsonRequest):
    """A request whose uploaded files wait in the server's folder for them.

    The framework's own way leads to the system's folder for temporary files, which is memory in many containers.
    """

    async def _get_form(
        self, *, max_files: int | float = 1000, max_fields: int | float = 1000, max_part_size: int = MAX_IN_MEMORY
    ) -> FormData:
        kind, _ = parse_options_header(self.headers.get("content-type"))
        if kind != b"multipart/form-data":
            return await super()._get_form(max_files=max_files, max_fields=max_fields, max_part_size=max_part_size)
        try:
            async with aclosing(self.stream()) as stream:
                parser = _SpoolingParser(
                    self.headers, stream, max_files=max_files, max_fields=max_fields, max_part_size=max_part_size
                )
                parser.folder = self.app.state.services.limits.spool_folder
                with spooling():
                    self._form = await parser.parse()
        except MultiPartException as error:
            raise HTTPException(400, error.message) from error
        return self._form


class _SpoolingParser(MultiPartParser):
    folder: Path | None = None

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        upload = self._current_part.file
        if upload is not None:
            upload.file.close()
            upload.file = open_spool(self.folder)
            self._files_to_close_on_error[-1] = upload.file  # type: ignore[call-overload] # of one kind with the other
