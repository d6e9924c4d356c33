"""``client.files`` of the asynchronous client."""

from __future__ import annotations

from qwen2vl_client.answer import StoredFile
from qwen2vl_client.async_transport import AsyncTransport
from qwen2vl_client.flows import Flows
from qwen2vl_client.media import ImageSource, VideoSource
from qwen2vl_client.uploads import PURPOSE


class AsyncFiles:
    """As ``Files``, awaited."""

    def __init__(self, flows: Flows, transport: AsyncTransport) -> None:
        self._flows = flows
        self._transport = transport

    async def upload(
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
        return await self._transport.run(flow)

    async def list(
        self,
        *,
        purpose: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        timeout: float | None = None,
    ) -> list[StoredFile]:
        """Return the files that the server keeps, the newest first."""
        return await self._transport.run(self._flows.files(purpose, limit, after, timeout))

    async def get(self, file_id: str | StoredFile, *, timeout: float | None = None) -> StoredFile:
        """Describe one file; ``NotFoundError`` when it has gone."""
        return await self._transport.run(self._flows.file(file_id, timeout))

    async def delete(self, file_id: str | StoredFile, *, timeout: float | None = None) -> None:
        """Delete one file; ``NotFoundError`` when it has gone."""
        await self._transport.run(self._flows.delete(file_id, timeout))
