"""The Hugging Face hub and its mirrors, through huggingface_hub."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from qwen2vl_serve.checkpoints import hubs
from qwen2vl_serve.download.listing import Advance, Listing, RepoFile, endpoint
from qwen2vl_serve.errors import DownloadError, HubUnreachable, PreflightError

ANSWER_SECONDS = 15.0


class HuggingFace:
    """The hub at ``HF_ENDPOINT``; ``cache`` is its library's own unless given."""

    title = "hf"

    def __init__(self, cache: Path | None = None) -> None:
        self._endpoint = endpoint("HF_ENDPOINT")
        try:
            # They come with vLLM, which the base install lacks.
            import huggingface_hub  # noqa: PLC0415
            from filelock import FileLock  # noqa: PLC0415
        except ImportError:
            raise PreflightError(
                "huggingface_hub is not installed; pip install 'huggingface-hub>=2.4,<3'"
            ) from None
        self._library = huggingface_hub
        self._lock = FileLock
        self._transport = importlib.import_module("huggingface_hub.file_download")
        self._cache = cache

    def listing(self, name: str, revision: str | None) -> Listing:
        """Ask for the files of a repository, at one commit."""
        api = self._library.HfApi(endpoint=self._endpoint)
        try:
            info = api.model_info(
                name, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS
            )
        except Exception as error:
            raise self._explained(error, name, revision) from error
        files = tuple(
            RepoFile(
                one.rfilename,
                one.size or 0,
                one.lfs.sha256 if one.lfs else None,
                None if one.lfs else one.blob_id,
            )
            for one in info.siblings or ()
        )
        return Listing(name, revision or "main", info.sha, files)

    def place(self, listing: Listing, to: Path | None) -> Path:
        """Return the folder given, or the commit's in the library's cache."""
        if to is not None:
            return to
        cache = self._cache or hubs.hugging_face_cache()
        return hubs.snapshot(listing.name, listing.commit, cache)

    def fetch(self, listing: Listing, file: RepoFile, to: Path | None, advance: Advance) -> Path:
        """Fetch a file; what came before an interruption, of another command too, is kept.

        The library's own download begins anew with each command; its transport does not have to.
        """
        folder = self.place(listing, to)
        target = folder / file.path
        if target.exists():
            return target
        # As the library lays its cache out: the content under its hash, and links to it.
        content = target if to is not None else hubs.content(folder, file.sha256 or file.git)
        part = self._part(content, file, to)
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Of two commands at once one fetches, and the other then finds it here.
            with self._lock(f"{part}.lock"):
                if not content.exists():
                    self._transfer(listing, file, part, advance)
                    part.replace(content)
                if not target.exists():
                    target.unlink(missing_ok=True)
                    target.symlink_to(os.path.relpath(content, target.parent))
        except Exception as error:
            raise self._explained(error, listing.name, listing.commit) from error
        return target

    def _transfer(self, listing: Listing, file: RepoFile, part: Path, advance: Advance) -> None:
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()  # begun of another revision, or what a mirror added
        url = self._library.hf_hub_url(
            listing.name, file.path, revision=listing.commit, endpoint=self._endpoint
        )
        with part.open("ab") as taking:
            self._transport.http_get(
                url,
                taking,
                resume_size=taking.tell(),
                headers=self._library.utils.build_hf_headers(),
                expected_size=file.size,
                tqdm_class=_bar(advance),
            )

    def _part(self, content: Path, file: RepoFile, to: Path | None) -> Path:
        """Return where a file is kept while it comes."""
        if to is not None:
            return to / ".cache" / "huggingface" / "download" / f"{file.path}{hubs.PART}"
        return content.with_name(f"{content.name}{hubs.PART}")

    def finish(self, listing: Listing, to: Path | None) -> None:
        """Note which commit a branch is at, as the library does when it asks by the branch."""
        if to is not None or listing.commit in (None, listing.revision):
            return
        folder = self.place(listing, None).parents[1]
        reference = folder / "refs" / listing.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(str(listing.commit), "ascii")

    def _explained(  # noqa: PLR0911 -- a table
        self, error: Exception, name: str, revision: str | None
    ) -> Exception:
        errors = self._library.errors
        status = getattr(getattr(error, "response", None), "status_code", None)
        at = self._endpoint or "huggingface.co"
        match error:
            case errors.GatedRepoError():
                return PreflightError(
                    f"{name}: is gated; accept its terms on its page, and set HF_TOKEN to a token "
                    "of that account"
                )
            case errors.RepositoryNotFoundError():
                return PreflightError(
                    f"{name}: {at} has no such model, or it is private; correct the name, or set "
                    "HF_TOKEN"
                )
            case errors.RevisionNotFoundError():
                return PreflightError(f"{name}: has no revision {revision}; correct it")
            case _ if status in (401, 403):
                return PreflightError(
                    f"{name}: {at} refuses it ({status}); set HF_TOKEN to a token of an account "
                    "that may have it"
                )
            case ImportError():  # of its transport, for the only proxies that need a package
                return PreflightError(
                    f"{name}: the environment names a SOCKS proxy (ALL_PROXY), which needs a "
                    "package; pip install socksio, or name an http:// proxy"
                )
            case errors.HfHubHTTPError() if status is not None:
                return DownloadError(f"{name}: {at} answers {status}; try again later")
            case OSError() if getattr(error, "errno", None) is not None and status is None:
                return DownloadError(f"{name}: {error.strerror or error}; {_AGAIN}")
            case _:
                return HubUnreachable(
                    f"{name}: {at} is not reached, or the connection broke "
                    f"({type(error).__name__}); {_AGAIN}"
                )


_AGAIN = "the same command goes on where it stopped"


def _bar(advance: Advance) -> type[Any]:
    """Return a class that huggingface_hub takes for a tqdm progress bar."""

    class Bar:
        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            advance(int(initial), fetched=False)

        def update(self, count: float = 1) -> None:
            advance(int(count))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, _: str) -> Any:
            return lambda *_, **__: None

    return Bar
