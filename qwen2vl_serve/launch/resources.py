"""What a server opens by its profile's word: the media loader, stores of uploads and batches."""

from __future__ import annotations

from pathlib import Path

from qwen2vl_serve.batches.store import BatchStore
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.media.fetch import Fetcher, FetchPolicy
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.media.image import FORMATS
from qwen2vl_serve.media.loader import MediaBudget, MediaLoader
from qwen2vl_serve.media.sampling import frame_rules
from qwen2vl_serve.media.sizing import picture_bounds
from qwen2vl_serve.media.video import VideoLimits
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.profile.media import FilesSection


def media_loader(profile: Profile, *, shared: bool = False) -> MediaLoader:
    """Return the loader for the profile's ``media`` and ``files`` sections.

    ``shared``: other servers use the folder for uploads as well.

    Raises:
        PreflightError: the folder for uploads cannot be used.
        ProfileError: a proxy of the environment is of no use.
    """
    media, limits = profile.media, profile.limits
    policy = FetchPolicy(
        max_bytes=media.max_download_bytes,
        total_seconds=media.download_seconds,
        ports=frozenset(media.allowed_ports),
        allowed_domains=frozenset(media.allowed_domains),
        denied_domains=frozenset(media.denied_domains),
        allowed_networks=media.allowed_networks,
        proxy=None if media.proxy is None else media.proxy.get_secret_value(),
    )
    video_limits = VideoLimits(
        max_bytes=media.max_video_bytes,
        max_frames=media.max_video_frames,
        max_pixels=media.max_video_pixels,
        seconds=media.video_decode_seconds,
    )
    return MediaLoader(
        Fetcher(policy),
        picture_bounds(media),
        media.max_image_pixels,
        frame_rules(media),
        video_limits,
        folders=media.allowed_local_paths,
        files=_file_store(profile.files, shared=shared),
        formats=frozenset(name for name, ours in FORMATS.items() if ours in media.formats),
        fast_decode=media.fast_decode,
        budget=MediaBudget(
            limits.max_media_bytes, limits.max_media_pixels, limits.max_media_frames
        ),
        max_decoding_bytes=media.max_decoding_bytes,
        max_held_bytes=media.max_held_bytes,
    )


def _file_store(files: FilesSection, *, shared: bool) -> FileStore | None:
    if files.max_files == 0:
        return None
    folder = None if files.folder is None else Path(files.folder).expanduser()
    try:
        return FileStore(
            folder,
            max_files=files.max_files,
            max_bytes=files.max_bytes,
            ttl_seconds=files.ttl_seconds,
            shared=shared,
        )
    except OSError as error:
        raise PreflightError(
            f"files.folder: cannot use {folder} ({error.strerror}); name another place."
        ) from None


def batch_store(profile: Profile) -> BatchStore | None:
    """Return the store of the profile's ``batches`` section, None where they are off.

    Raises:
        PreflightError: its folder cannot be used.
    """
    section = profile.batches
    if not section.enabled:
        return None
    folder = profile.batches_path
    try:
        return BatchStore(folder, ttl_seconds=section.ttl_seconds, max_bytes=section.max_bytes)
    except BlockingIOError:
        raise PreflightError(
            f"batches.folder: another server uses {folder}; name another place."
        ) from None
    except OSError as error:
        raise PreflightError(
            f"batches.folder: cannot use {folder} ({error.strerror}); name another place."
        ) from None
