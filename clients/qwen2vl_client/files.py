"""Files that the server keeps for a while: ``client.files``."""

from __future__ import annotations

from qwen2vl_client.answer import StoredFile
from qwen2vl_client.flows import Flows
from qwen2vl_client.media import ImageSource, VideoSource
from qwen2vl_client.transport import Transport
from qwen2vl_client.uploads import PURPOSE


class Files:
    """Uploads, and what became of them; large pictures of a chat are uploaded without it."""

    def __init__(self, flows: Flows, transport: Transport) -> None:
        self._flows = flows
        self._transport = transport

    def upload(
        self,
        source: ImageSource | VideoSource,
        *,
        purpose: str = PURPOSE,
        filename: str | None = None,
        expires_after: int | None = None,
        timeout: float | None = None,
    ) -> StoredFile:
        """Have the server keep a picture, PDF or video, for ``expires_after`` seconds at most.

        The same bytes get the same id, and their time begins anew.
        """
        flow = self._flows.upload(source, purpose, filename, expires_after, timeout)
        return self._transport.run(flow)

    def list(
        self,
        *,
        purpose: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        timeout: float | None = None,
    ) -> list[StoredFile]:
        """Return the files that the server keeps, the newest first."""
        return self._transport.run(self._flows.files(purpose, limit, after, timeout))

    def get(self, file_id: str | StoredFile, *, timeout: float | None = None) -> StoredFile:
        """Describe one file; ``NotFoundError`` when it has gone."""
        return self._transport.run(self._flows.file(file_id, timeout))

    def delete(self, file_id: str | StoredFile, *, timeout: float | None = None) -> None:
        """Delete one file; ``NotFoundError`` when it has gone."""
        self._transport.run(self._flows.delete(file_id, timeout))
