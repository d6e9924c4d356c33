"""The fleet as a Ray Serve application: ``import_path: qwen2vl_serve.fleet.application:fleet``.

Two deployments: ``Gateways`` take HTTP from Ray's proxies, ``Replicas`` have an engine each. What
their numbers, cards and autoscaling are is said in Ray's own file; see ``deploy/ray``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2vl_serve.fleet import known
from qwen2vl_serve.fleet.asking import Ask, Messages
from qwen2vl_serve.fleet.gateway import Gateway, ReplicaLost
from qwen2vl_serve.fleet.options import FleetOptions
from qwen2vl_serve.fleet.preflight import door_keys, refuse_what_is_one_servers
from qwen2vl_serve.fleet.replica import Replica
from qwen2vl_serve.fleet.router import AffinityRouter, RandomRouter
from qwen2vl_serve.line import Refused
from qwen2vl_serve.profile import load_profile

ROUTERS = {"affinity": AffinityRouter, "random": RandomRouter}

SEAM = "qwen2vl_serve.vllm_engine"

LEAVE_SECONDS = 10.0
"""Beside ``server.shutdown_timeout``: until a replica that ends is killed."""

GATEWAY_SURGE = 25
"""So many more gateways, in percent and one at least, there are while a new version comes."""

MOST_AT_GATEWAY = 10_000
"""Requests that one gateway has at once; they wait there for replicas."""


def fleet(args: Mapping[str, Any]) -> serve.Application:
    """Return the application for ``args`` of Ray's file; see ``FleetOptions``.

    They come as they stand there: Ray makes a model of them only where it finds the class itself
    as the annotation, and not its name.

    Raises:
        ProfileError: they or the profile are not valid, or a file of keys cannot be read.
        PreflightError: what it asks for is one server's own, or others reach it without a key.
    """
    return application(FleetOptions.of(args), SEAM)


def application(options: FleetOptions, seam: str) -> serve.Application:
    """Return the application whose replicas start their engine by the module ``seam``."""
    profile = load_profile(options.profile, list(options.set))
    refuse_what_is_one_servers(profile)
    door_keys(profile)
    limits = profile.limits
    cards = profile.workers if profile.hardware.device == "cuda" else 0
    grace = profile.server.shutdown_timeout
    replicas = serve.deployment(
        Replicas,
        name="Replicas",
        # Who waits for a place waits in the replica, in its key's turn, not in Ray.
        max_ongoing_requests=limits.max_in_flight + limits.max_queued + 1,
        graceful_shutdown_timeout_s=grace + LEAVE_SECONDS,
        ray_actor_options={"num_cpus": options.replica_cpus, "num_gpus": cards},
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTERS[options.routing],
            request_router_kwargs={"slack": options.slack, "at_ease": options.at_ease},
        ),
        **options.count(),
    ).bind(options.profile, options.set, seam)
    gateways = serve.deployment(
        serve.ingress(_entrance)(Gateways),
        name="Gateways",
        num_replicas=options.gateways,
        max_ongoing_requests=MOST_AT_GATEWAY,
        # In a new version the next one is there before one leaves: of one, there would be none.
        max_surge_percent=GATEWAY_SURGE,
        ray_actor_options={"num_cpus": 0.5},
        graceful_shutdown_timeout_s=grace + 2 * LEAVE_SECONDS,
    )
    return gateways.bind(options.profile, options.set, replicas)


class Replicas:
    """One engine, and all of our application above it."""

    async def __init__(self, profile: str, settings: Sequence[str], seam: str) -> None:  # type: ignore[misc]
        name = serve.get_replica_context().replica_id.unique_id
        self.replica = Replica(load_profile(profile, list(settings)), name, seam)
        await self.replica.start()

    async def answer(self, ask: Ask) -> AsyncGenerator[Messages, None]:
        """Yield the ASGI messages of an answer."""
        async with aclosing(self.replica.answer(ask)) as batches:
            async for batch in batches:
                yield batch

    async def check_health(self) -> None:
        """Raise where Ray is to start another replica in the place of this one."""
        await self.replica.check()

    async def __del__(self) -> None:
        """End the engine; Ray awaits it when the last answer has ended."""
        await self.replica.close()


def _entrance() -> ASGIApp:
    """Return what leads Ray's proxy to the gateway of its process."""

    async def enter(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return

        async def send_without_id(message: Message) -> None:
            # Ray's proxy adds the header itself, with the id that the scope names.
            if message["type"] == "http.response.start":
                headers = [one for one in message["headers"] if one[0] != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        gateways: Any = serve.get_replica_context().servable_object
        await gateways.gateway.app(scope, receive, send_without_id)

    return enter


class Gateways:
    """The door, without an engine."""

    def __init__(self, profile: str, settings: Sequence[str], replicas: DeploymentHandle) -> None:
        self.handle = replicas.options(method_name="answer", stream=True)
        loaded = load_profile(profile, list(settings))
        self.gateway = Gateway(loaded, door_keys(loaded), self.answers, lambda: known.replicas)

    async def answers(self, ask: Ask) -> AsyncGenerator[Messages, None]:
        """Have Ray choose a replica, and yield what it says."""
        said = self.handle.remote(ask)
        try:
            async for batch in said:
                yield batch
        except BackPressureError:
            raise Refused("full", "Too many requests wait for a replica") from None
        except (RayActorError, RayTaskError, DeploymentUnavailableError) as error:
            raise ReplicaLost(str(error)) from error
        finally:
            said.cancel()
