"""The routes that load and unload adapters while the server runs, in vLLM's shapes.

They read folders of the server, and what they change every client meets. So they are off unless
the profile names the folders, and open to the operator's keys alone: those of the profile, the key
file and the environment, not the named ones that clients get.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from qwen2vl_serve.adapters.lora import read_adapter
from qwen2vl_serve.adapters.named import check_room, model_config
from qwen2vl_serve.auth.keys import Caller
from qwen2vl_serve.engine import Adapter, Engine, ServedModel
from qwen2vl_serve.errors import InvalidValue, PermissionDenied, PreflightError
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.profile.adapters import AdapterName
from qwen2vl_serve.protocol.validation import parse_fields


class LoadRequest(BaseModel):
    """The body of ``POST /v1/load_lora_adapter``."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool | None = False


class UnloadRequest(BaseModel):
    """The body of ``POST /v1/unload_lora_adapter``."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    lora_name: AdapterName


class AdaptersAPI:
    """The two routes, over the engine; ``with_key`` tells whether the server has keys at all.

    ``read`` returns a body within the limits, ``admit`` raises an ``APIError`` while nothing new
    is taken, ``forget`` is told of a name that is gone, ``card`` describes a model.
    """

    def __init__(
        self,
        engine: Engine,
        profile: Profile,
        *,
        with_key: bool,
        read: Callable[[Request], Awaitable[bytes]],
        admit: Callable[[], None],
        forget: Callable[[str], None],
        card: Callable[[ServedModel], dict[str, Any]],
    ) -> None:
        self.engine = engine
        self.profile = profile
        self.with_key = with_key
        self.read = read
        self.admit = admit
        self.forget = forget
        self.card = card
        self._folders = tuple(
            Path(folder).expanduser().resolve() for folder in profile.adapters.allowed_paths
        )
        # One at a time: reading may take seconds, and two loads of one name must not pass together.
        self._turn = asyncio.Lock()

    async def load(self, request: Request) -> JSONResponse:
        """Load an adapter from one of the allowed folders, under a name of its own."""
        self._check_caller(request)
        wanted = parse_fields(await self.read(request), LoadRequest)
        async with self._turn:
            self._check_name(wanted)
            adapter = await asyncio.to_thread(self._read, wanted.lora_path)
            model = await self.engine.load_adapter(wanted.lora_name, adapter)
        return JSONResponse(self.card(model))

    async def unload(self, request: Request) -> JSONResponse:
        """Take an adapter away; answers that use it end as they would have."""
        self._check_caller(request)
        name = parse_fields(await self.read(request), UnloadRequest).lora_name
        async with self._turn:
            await self.engine.unload_adapter(name)
        self.forget(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    def _check_caller(self, request: Request) -> None:
        self.admit()
        if not self._folders:
            raise PermissionDenied(
                "Adapters are not loaded while this server runs; its operator allows folders for "
                "that in adapters.allowed_paths of the profile."
            )
        caller: Caller = request.state.caller
        if not self.with_key or caller.name:
            raise PermissionDenied(
                "This needs a key of the profile (server.api_keys, server.api_key_file) or of the "
                "server's environment."
            )

    def _check_name(self, wanted: LoadRequest) -> None:
        name = wanted.lora_name
        known = next((model for model in self.engine.models if model.id == name), None)
        if known is not None and known.parent is None:
            raise InvalidValue(
                f"lora_name {name!r} is the model's own; give another.", param="lora_name"
            )
        if known is not None and not wanted.load_inplace:
            raise InvalidValue(
                f"lora_name {name!r} is loaded; send load_inplace: true to replace it.",
                param="lora_name",
            )

    def _read(self, path: str) -> Adapter:
        """Read and check the adapter in a folder that is given absolutely or below an allowed one.

        Raises:
            InvalidValue: outside of the allowed folders (whatever is there), or not to be served.
        """
        try:
            folder = next(
                place
                for allowed in self._folders
                if (place := (allowed / path).resolve()).is_relative_to(allowed) and place.is_dir()
            )
        except (StopIteration, OSError, RuntimeError, ValueError):
            raise InvalidValue(
                f"lora_path {path[:200]!r} is no folder below those of "
                "adapters.allowed_paths in the profile.",
                param="lora_path",
            ) from None
        try:
            config = model_config(self.profile)
            adapter = read_adapter(folder, config)
            check_room(adapter, self.profile, config)
        except PreflightError as error:
            raise InvalidValue(f"{error}.", param="lora_path") from None
        except OSError as error:
            raise InvalidValue(
                f"lora_path {path[:200]!r} cannot be read: {error.strerror}.", param="lora_path"
            ) from None
        return adapter
