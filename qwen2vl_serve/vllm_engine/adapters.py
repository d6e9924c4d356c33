"""LoRA adapters in vLLM's engine: known by their content, never evicted, removed when unused."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from qwen2vl_serve.engine import Adapter, ServedModel
from qwen2vl_serve.errors import EngineUnavailable, InvalidValue, ModelNotFound, TooManyItems

logger = logging.getLogger(__name__)

_MARK = "@"


def places(room: int) -> dict[str, int]:
    """Return the engine arguments under which ``room`` adapters are computed rightly.

    On CPUs vLLM takes the place -1, which means no adapter, for an index: a request to the model
    itself that shares a step with one to an adapter is computed with whatever is in the last place
    (``vllm/lora/ops/torch_ops/lora_ops.py``). With a place more than adapters it stays empty.
    """
    if room == 0 or not current_platform.is_cpu():
        return {}
    return {"max_loras": room + 1, "max_cpu_loras": room + 1}


class Models(OpenAIServingModels):  # type: ignore[misc]  # vLLM ships no type information
    """vLLM's list of names; an adapter's inner name holds its digest, which clients do not see."""

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """Return the name that an answer tells."""
        if lora_request is None:
            return str(self.base_model_paths[0].name)
        return str(lora_request.lora_name.rpartition(_MARK)[0])


@dataclass(eq=False, slots=True)
class _Held:
    """An adapter in the engine; ``gone`` when no new request may take it."""

    request: LoRARequest
    model: ServedModel
    users: int = 0
    gone: bool = False


@dataclass
class Adapters:
    """What is loaded, by the names that clients use.

    vLLM reads an adapter that it has evicted from its folder again when it is next asked for, and
    its engine dies when that fails. So no more are held than it has room for (``room``), and one
    that is unloaded stays until its last answer has ended. vLLM knows cached prompts and pictures
    by an adapter's name: with the content's digest in it, another adapter that takes the name
    later is not answered for by the first one's.
    """

    client: EngineClient
    models: Models
    window: int
    room: int
    _held: list[_Held] = field(default_factory=list)
    _next: int = 0
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def served(self) -> Sequence[ServedModel]:
        """The adapters that new requests may name, in the order in which they were loaded."""
        return [held.model for held in self._held if not held.gone]

    async def load(self, name: str, adapter: Adapter) -> ServedModel:
        """Have the engine load an adapter; one of the same name is replaced, once it is loaded.

        Raises:
            TooManyItems: as many are held as there is room for.
            InvalidValue: vLLM refuses it.
            EngineUnavailable: the engine has stopped.
        """
        async with self._lock:
            if len(self._held) >= self.room:
                going = sum(held.gone for held in self._held)
                raise TooManyItems(
                    f"{self.room} adapters are held, {going} of them until their answers have "
                    "ended; unload one, or raise engine.max_cpu_loras in the profile.",
                    param="lora_name",
                )
            self._next += 1
            request = LoRARequest(
                lora_name=f"{name}{_MARK}{adapter.digest}",
                lora_int_id=self._next,
                lora_path=str(adapter.folder),
            )
            try:
                await self.client.add_lora(request)
            except EngineDeadError:
                raise EngineUnavailable("The engine has stopped.") from None
            except Exception as error:
                logger.exception("vLLM did not load the adapter %s", name)
                with suppress(EngineDeadError):
                    await self.client.remove_lora(request.lora_int_id)
                raise InvalidValue(
                    f"The engine refuses the adapter {name!r}: {error}.", param="lora_path"
                ) from None
            parent = str(self.models.base_model_paths[0].name)
            held = _Held(request, ServedModel(name, int(time.time()), self.window, parent))
            before = self._find(name)
            self._held.append(held)
            self.models.lora_requests[name] = request
            if before is not None:
                self._let_go(before)
            return held.model

    async def unload(self, name: str) -> None:
        """Take an adapter away: from new requests now, from the engine when its answers have ended.

        Raises:
            ModelNotFound: there is none of this name.
        """
        async with self._lock:
            held = self._find(name)
            if held is None:
                raise ModelNotFound(f"No adapter is named {name[:100]!r}.", param="lora_name")
            del self.models.lora_requests[name]
            self._let_go(held)

    @contextmanager
    def used(self, name: str | None) -> Iterator[LoRARequest | None]:
        """Hold an adapter while a request is answered; None for the model itself."""
        held = None if name is None else self._find(name)
        if held is None:
            yield None
            return
        held.users += 1
        try:
            yield held.request
        finally:
            held.users -= 1
            if held.gone:
                self._let_go(held)

    def _find(self, name: str) -> _Held | None:
        return next((one for one in self._held if one.model.id == name and not one.gone), None)

    def _let_go(self, held: _Held) -> None:
        held.gone = True
        if held.users == 0:
            task = asyncio.create_task(self._remove(held))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _remove(self, held: _Held) -> None:
        try:
            await self.client.remove_lora(held.request.lora_int_id)
        except EngineDeadError:
            logger.info("the engine is gone, and with it adapter %s", held.model.id)
        except Exception:
            # It may be there still, and vLLM would evict another for the next.
            logger.exception(
                "vLLM did not remove the adapter %s: its place stays taken", held.model.id
            )
            return
        self._held.remove(held)
