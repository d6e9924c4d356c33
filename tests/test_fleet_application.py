"""What a fleet tells Ray of itself, and how its router chooses, over a stand-in of Ray.

``test_fleet.py`` asks Ray itself, which is not among the tests' packages.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml

from qwen2vl_serve.errors import PreflightError, ProfileError
from qwen2vl_serve.fleet.affinity import AT_EASE, SLACK, ranked
from qwen2vl_serve.fleet.asking import Ask
from qwen2vl_serve.fleet.options import FleetOptions

FILES = Path(__file__).parents[1] / "deploy" / "ray"
MODULES = [f"qwen2vl_serve.fleet.{name}" for name in ("application", "router")]
DEMO = {"profile": "demo", "set": ["files.max_files=0"]}


class Bound(SimpleNamespace):
    """A deployment: what it runs, its options, and what its replicas are made with."""


def deployment(target: Any, **options: Any) -> Any:
    return SimpleNamespace(bind=lambda *args: Bound(target=target, options=options, args=args))


class RequestRouter:
    """What the base class has: the replicas' lengths of queues, and the hook of new replicas."""

    replica_queue_len_cache: Mapping[Any, int]

    def update_replicas(self, replicas: list[Any]) -> None:
        pass


STAND_IN: dict[str, dict[str, Any]] = {
    "ray": {},
    "ray.serve": {
        "Application": Bound,
        "deployment": deployment,
        "ingress": lambda _: lambda target: target,
    },
    "ray.exceptions": {"RayActorError": OSError, "RayTaskError": RuntimeError},
    "ray.serve.config": {"RequestRouterConfig": SimpleNamespace},
    "ray.serve.exceptions": {
        "BackPressureError": BufferError,
        "DeploymentUnavailableError": LookupError,
    },
    "ray.serve.handle": {"DeploymentHandle": object},
    "ray.serve.request_router": {
        "PendingRequest": object,
        "RequestRouter": RequestRouter,
        "RunningReplica": object,
    },
}


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module as it is imported over the stand-in; others find it as if it had not been."""
    for name, content in STAND_IN.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(MODULES[0])
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def no_keys_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN2VL_API_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def replicas(application: Any, **args: Any) -> Bound:
    """The deployment of the replicas that the gateways ask."""
    found = application.fleet({**DEMO, **args}).args[-1]
    assert isinstance(found, Bound)
    return found


def test_without_a_most_there_are_as_many_as_are_asked_for(application: Any) -> None:
    """Ray is given a number, and nothing to scale by."""
    options = replicas(application, replicas=3, target_ongoing_requests=8).options
    assert options["num_replicas"] == 3
    assert "autoscaling_config" not in options


def test_the_depth_of_the_queue_decides_how_many_there_are(application: Any) -> None:
    """Ray is given the fewest, the most, the requests of each, and its own patience; it may send a
    replica all that runs and waits there, or its queue would never be seen to grow. A number to
    start with it is not given, or each new version would begin with it under any load."""
    options = replicas(
        application, replicas=2, max_replicas=16, target_ongoing_requests=24.5,
        set=[*DEMO["set"], "limits.max_in_flight=8", "limits.max_queued=100"],
    ).options  # fmt: skip
    assert options["autoscaling_config"] == {
        "min_replicas": 2,
        "max_replicas": 16,
        "target_ongoing_requests": 24.5,
        "upscale_delay_s": 30,
        "downscale_delay_s": 600,
    }
    assert "num_replicas" not in options
    assert options["max_ongoing_requests"] == 8 + 100 + 1


def test_an_adapter_is_on_all_replicas_or_none(application: Any, tmp_path: Path) -> None:
    """Each replica gets the profile's; folders to load others from are refused by the field."""
    named = f"adapters.lora_modules.ocr={tmp_path}"
    assert replicas(application, set=[*DEMO["set"], named]).args[1] == (*DEMO["set"], named)
    with pytest.raises(PreflightError, match=r"^adapters\.allowed_paths: .*adapters\.lora_modules"):
        replicas(application, set=[*DEMO["set"], f'adapters.allowed_paths=["{tmp_path}"]'])


def test_how_soon_replicas_come_and_go_can_be_set(application: Any) -> None:
    """At once as well; less than that is refused."""
    given = {"max_replicas": 2, "upscale_delay_s": 0, "downscale_delay_s": 60.5}
    config = replicas(application, **given).options["autoscaling_config"]
    assert {name: config[name] for name in given} == given
    for name in ("upscale_delay_s", "downscale_delay_s"):
        with pytest.raises(ProfileError, match=rf"^args\.{name}: must be greater than or equal"):
            replicas(application, **{name: -1})


def test_a_gateway_stays_until_the_next_one_is_there(application: Any) -> None:
    """Of one as well, or a new version would leave the fleet without a door while it starts."""
    options = application.fleet(DEMO).options
    assert options["num_replicas"] == 1
    assert 0 < options["max_surge_percent"] <= 100


def test_a_replica_takes_the_cards_of_its_profile(application: Any) -> None:
    """None on a CPU; on cards as many as it has workers, and the CPUs that are asked for."""
    cpu = replicas(application, replica_cpus=2).options["ray_actor_options"]
    assert cpu == {"num_cpus": 2, "num_gpus": 0}
    cards = replicas(application, profile="multi-gpu").options["ray_actor_options"]
    assert cards == {"num_cpus": 1, "num_gpus": 8}


def test_the_router_is_the_one_that_is_named(application: Any) -> None:
    """With the bounds of a replica's load."""
    config = replicas(application).options["request_router_config"]
    assert config.request_router_class is application.AffinityRouter
    assert config.request_router_kwargs == {"slack": SLACK, "at_ease": AT_EASE}
    config = replicas(application, routing="random", slack=2).options["request_router_config"]
    assert config.request_router_class is application.RandomRouter
    assert config.request_router_kwargs["slack"] == 2


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_args_are_taken_as_rays_file_has_them(application: Any, file: Path, tmp_path: Path) -> None:
    """Ray hands the mapping on, as it sees the name of a class for annotation and not the class."""
    text = file.read_text("utf-8").replace("/etc/qwen2vl/keys", str(tmp_path / "keys"))
    (tmp_path / "keys").write_text("sk-1\n")
    (one,) = yaml.safe_load(text)["applications"]
    gateways = application.fleet(one["args"])
    assert gateways.options["num_replicas"] == one["args"].get("gateways", 1)
    assert gateways.args[:2] == (one["args"]["profile"], tuple(one["args"]["set"]))
    scaled = gateways.args[-1].options.get("autoscaling_config", {})
    assert scaled.get("max_replicas") == one["args"].get("max_replicas")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            {"replicas": 4, "max_replicas": 2},
            "args.max_replicas: must be at least replicas (4), is 2; raise it, or leave it out",
        ),
        ({"max_replicas": 0}, "args.max_replicas: must be greater than 0, is 0"),
        (
            {"target_ongoing_requests": -1},
            "args.target_ongoing_requests: must be greater than 0, is -1",
        ),
        ({"slack": float("inf")}, "args.slack: must be a finite number, is inf"),
        (
            {"routing": "least busy"},
            "args.routing: must be 'affinity' or 'random', is 'least busy'",
        ),
        (
            {"max_replica": 2},
            f"args.max_replica: is unknown; there are {', '.join(FleetOptions.model_fields)}",
        ),
        ({"profile": None}, "args.profile: must be a valid string, is None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_args_are_refused(args: dict[str, Any], told: str) -> None:
    """In one line that names the field, its bound and the value."""
    with pytest.raises(ProfileError) as refused:
        FleetOptions.of({**DEMO, **args})
    assert str(refused.value) == told


def test_a_profile_is_required() -> None:
    """The one field without a default."""
    with pytest.raises(ProfileError, match=r"^args\.profile: is required$"):
        FleetOptions.of({})


class Name(NamedTuple):
    unique_id: str


def test_who_took_a_request_is_noted_and_comes_last_the_next_time(application: Any) -> None:
    """So a replica that is lost is not asked again while there is another."""
    router = application.AffinityRouter()
    router.initialize_state()
    router.replica_queue_len_cache = {}
    there = {name: SimpleNamespace(replica_id=Name(name)) for name in ("one", "two", "three")}

    def order(ask: Ask, *names: str) -> list[str]:
        pending = SimpleNamespace(args=[ask])
        ranks = asyncio.run(router.choose_replicas([there[name] for name in names], pending))
        return [one.replica_id.unique_id for (one,) in ranks]

    ask = Ask("a picture", {}, b"")
    best, *others = order(ask, *there)
    assert [best, *others] == ranked("a picture", list(there))
    router.on_request_routed(SimpleNamespace(args=[ask]), Name(best), None)
    assert ask.sent_to == [best]
    again = ask.elsewhere(*ask.sent_to)
    assert order(again, *there) == [*others, best]
    assert order(again, best) == [best]
    router.on_request_routed(SimpleNamespace(args=[]), Name(best), None)
