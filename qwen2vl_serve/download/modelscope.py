"""ModelScope, through modelscope_hub (the extra ``modelscope``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2vl_serve.checkpoints import hubs
from qwen2vl_serve.download.listing import Advance, Listing, RepoFile, endpoint
from qwen2vl_serve.errors import DownloadError, HubUnreachable, PreflightError

BRANCH = "master"


class ModelScope:
    """The hub at ``MODELSCOPE_ENDPOINT``; ``cache`` is its library's own unless given.

    It tells branches and tags, but no commit; what is fetched is held to the hashes of the listing.
    """

    title = "modelscope"

    def __init__(self, cache: Path | None = None) -> None:
        endpoint("MODELSCOPE_ENDPOINT")
        try:
            import modelscope_hub  # noqa: PLC0415 -- an extra
        except ImportError:
            raise PreflightError(
                "modelscope_hub is not installed; pip install 'modelscope-hub>=0.5,<1'"
            ) from None
        self._library = modelscope_hub
        self._api = modelscope_hub.HubApi(modelscope_hub.HubConfig())
        self._cache = cache

    def listing(self, name: str, revision: str | None) -> Listing:
        """Ask for the files of a repository."""
        try:
            found = self._api.list_repo_files(name, "model", revision=revision)
        except Exception as error:
            raise self._explained(error, name, revision) from error
        files = tuple(RepoFile(one.path, one.size, one.sha256) for one in found if not one.is_dir)
        return Listing(name, revision or BRANCH, None, files)

    def place(self, listing: Listing, to: Path | None) -> Path:
        """Return the folder given, or the one of the library's cache."""
        if to is not None:
            return to
        cache = self._cache or hubs.modelscope_cache()
        return hubs.modelscope_snapshot(listing.name, listing.revision, cache)

    def fetch(self, listing: Listing, file: RepoFile, to: Path | None, advance: Advance) -> Path:
        """Fetch a file; what came before an interruption is not fetched again."""
        callback = _callback(advance)
        try:
            return Path(
                self._api.downloader.download_file(
                    listing.name,
                    "model",
                    file.path,
                    revision=listing.revision,
                    cache_dir=self._cache,
                    local_dir=self.place(listing, to),
                    expected_sha256=file.sha256,
                    file_size=file.size,
                    progress_callbacks=[callback],
                )
            )
        except Exception as error:
            raise self._explained(error, listing.name, listing.revision) from error

    def finish(self, listing: Listing, to: Path | None) -> None:
        """Nothing is left to do."""

    def _explained(  # noqa: PLR0911 -- a table
        self, error: Exception, name: str, revision: str | None
    ) -> Exception:
        errors = self._library.errors
        match error:
            case errors.FileIntegrityError():
                return DownloadError(
                    f"{name}: a file does not have the hash that ModelScope says; the connection "
                    "or a proxy changes it"
                )
            case errors.NotExistError():
                return PreflightError(
                    f"{name}: ModelScope has no such model (revision {revision or BRANCH}), or it "
                    "is private; correct the name, or set MODELSCOPE_API_TOKEN"
                )
            case errors.AuthenticationError() | errors.PermissionDeniedError():
                return PreflightError(
                    f"{name}: ModelScope refuses it; set MODELSCOPE_API_TOKEN to a token of an "
                    "account that may have it"
                )
            case _ if "SOCKS" in str(error):
                return PreflightError(
                    f"{name}: the environment names a SOCKS proxy (ALL_PROXY), which needs a "
                    "package; pip install PySocks, or name an http:// proxy"
                )
            case errors.APIError():
                return DownloadError(f"{name}: ModelScope answers with an error; try again later")
            case OSError() if error.errno is not None and error.strerror:
                return DownloadError(f"{name}: {error.strerror}; the same command goes on")
            case _:
                return HubUnreachable(
                    f"{name}: ModelScope is not reached, or the connection broke "
                    f"({type(error).__name__}); the same command goes on where it stopped"
                )


def _callback(advance: Advance) -> type[Any]:
    from modelscope_hub._download import ProgressCallback  # noqa: PLC0415 -- see above
    from modelscope_hub.constants import DOWNLOAD_CHUNK_SIZE  # noqa: PLC0415

    class Callback(ProgressCallback):
        def update(self, size: int) -> None:
            # More than a chunk is what was kept of an interruption; less than 0 takes it back.
            advance(size, fetched=0 < size <= DOWNLOAD_CHUNK_SIZE)

    return Callback
