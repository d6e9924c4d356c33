"""Profiles: what is read, what is refused and how, and what vLLM is told."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qwen2vl_serve.errors import ProfileError
from qwen2vl_serve.profile import (
    BARE_OVERRIDES,
    Profile,
    equal_shares,
    load_profile,
    one_cpu_each,
    profile_names,
    section_of,
)
from qwen2vl_serve.profile import sections as profile_sections
from qwen2vl_serve.profile.rehearsal import rehearsal

MINIMAL = "model:\n  model: demo\n"
SHIPPED = [
    "demo",
    "multi-gpu",
    "multi-gpu-72b-awq",
    "single-3090",
    "single-gpu-2b",
    "single-gpu-awq",
]


@pytest.fixture
def write(tmp_path: Path):
    def write_profile(text: str | bytes, name: str = "p.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write_profile


def refusal(path: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(path, overrides or [])
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_profiles_that_ship_load_by_name():
    """Six ship; each keeps its name, says what it is for and takes at least one picture."""
    assert profile_names() == SHIPPED
    for name in SHIPPED:
        profile = load_profile(name)
        assert profile.name == name
        assert profile.description
        assert profile.media.limit_mm_per_prompt.image > 0


def test_minimal_profile_is_closed_by_default(write):
    """One picture, no video, bounded pixels, this machine only, no key."""
    profile = load_profile(write(MINIMAL))
    assert profile.media.limit_mm_per_prompt.model_dump() == {"image": 1, "video": 0}
    assert profile.media.max_pixels == 1280 * 28 * 28
    assert profile.server.host == "127.0.0.1"
    assert profile.limits.max_body_bytes == 64 * 1024 * 1024
    assert profile.api_keys({}) == frozenset()


def test_kind_of_media_that_is_not_named_is_refused(write):
    """With a limit for videos alone vLLM is told of 0 pictures, not left to its own default."""
    profile = load_profile(write(MINIMAL + "media:\n  limit_mm_per_prompt: {video: 2}\n"))
    assert profile.engine_args()["limit_mm_per_prompt"] == {"image": 0, "video": 2}


def test_a_name_is_served_once():
    """Twice, it would be listed twice."""
    told = refusal("demo", ["model.served_model_name=[a, b, a]"])
    assert "model.served_model_name has 'a' twice; keep one" in told


def test_origins_and_hosts_may_have_every_form_that_can_match():
    """Ports and the schemes of programs with pages; addresses of both kinds, with or without []."""
    origins = '["*", "http://localhost:3000", "https://xn--fsq.example:8443", "app://x", "null"]'
    hosts = '["*", "a-b.example", "127.0.0.1", "::1", "[fe80::1]"]'
    told = [f"server.cors_origins={origins}", f"server.allowed_hosts={hosts}"]
    assert len(load_profile("demo", told).server.cors_origins) == 5
    assert len(load_profile("demo", told).server.allowed_hosts) == 5


def test_profile_is_immutable():
    """Setting a field of a section raises: what was checked at load stays as it was."""
    profile = load_profile("demo")
    with pytest.raises(ValidationError):
        profile.server.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("engine:\n  max_model_length: 4096\n", 4, ["engine.max_model_length", "max_model_len?"]),
        ("engine:\n  max-model-len: 4096\n", 4, ["engine.max-model-len", "mean max_model_len"]),
        ("enginee:\n  seed: 1\n", 3, ["enginee", "did you mean engine?"]),
        ("max_model_len: 4096\n", 3, ["belongs to section engine"]),
        ("media:\n  limit_mm_per_prompt: {audio: 1}\n", 4, ["audio", "image, video"]),
        ("engine:\n  max_model_len: '8784'\n", 4, ["valid integer", "'8784'"]),
        ("engine:\n  max_model_len: 8784.0\n", 4, ["valid integer", "8784.0"]),
        ("engine:\n  max_model_len: true\n", 4, ["valid integer", "True"]),
        ("engine:\n  max_model_len: 0\n", 4, ["greater than or equal to 1", "0"]),
        ("engine:\n  max_model_len: 010\n", 4, ["valid integer", "'010'"]),
        ("engine:\n  enforce_eager: yes\n", 4, ["valid boolean", "'yes'"]),
        ("engine:\n  gpu_memory_utilization: 1.5\n", 4, ["less than or equal to 1", "1.5"]),
        ("engine:\n  gpu_memory_utilization: .nan\n", 4, ["'.nan'"]),
        ("engine:\n  seed: [1]\n", 4, ["engine.seed", "[1]"]),
        ("engine:\n  seed: -1\n", 4, ["engine.seed", "greater than or equal to 0", "-1"]),
        ("engine:\n  seed: 4294967296\n", 4, ["engine.seed", "less than or equal to 4294967295"]),
        ("engine: 3\n", 3, ["section of keys and values"]),
        ("engine:\n", 3, ["engine is empty", "leave it out"]),
        ("media:\n  allowed_networks: [10.0.0.1/8]\n", 4, ["must be networks", "host bits"]),
        ("server:\n  cors_origins: [example.com]\n", 4, ["https://example.com", "'example.com'"]),
        ("server:\n  cors_origins: ['https://a.b/']\n", 4, ["without a path", "'https://a.b/'"]),
        ("server:\n  cors_origins: [https://A.b]\n", 4, ["small letters", "'https://A.b'"]),
        ("server:\n  allowed_hosts: ['http://x']\n", 4, ["without scheme", "'http://x'"]),
        ("server:\n  allowed_hosts: ['x:8000']\n", 4, ["port", "'x:8000'"]),
        ("server:\n  allowed_hosts: ['*.x.y']\n", 4, ["names", "'*.x.y'"]),
        ("engine:\n  seed: 1\n  seed: 2\n", 5, ["engine.seed", "twice", ":4"]),
        ("engine:\n\tseed: 1\n", 4, ["tab", "spaces"]),
        ("engine: &a {seed: 1}\nserver: *a\n", 4, ["aliases"]),
        ("engine:\n  seed: !!python/object/apply:os.getcwd []\n", 4, ["tag", "not allowed"]),
        ("engine:\n  seed: !!int x\n", 4, ["'x'"]),
        ("engine:\n  seed: !!binary aGk=\n", 4, ["tag", "not allowed"]),
        ("engine:\n  <<: {seed: 1}\n", 4, ["<<"]),
        ("engine:\n  ? [a]\n  : 1\n", 4, ["key"]),
        ("engine: {seed: 1\n", 4, [","]),
        ("---\nengine: {}\n", 3, ["document"]),
        ("server:\n  port: 70000\n", 4, ["65535", "70000"]),
        ("server:\n  ssl_keyfile: k.pem\n", 4, ["ssl_certfile"]),
        ("hardware:\n  cards: 8\n", 4, ["hardware.cards is 8", "1 × ", "= 1"]),
        ("hardware:\n  device: cpu\n  cards: 1\n", 5, ["leave it out"]),
        ("hardware:\n  cpu_threads_bind: 0|1\n", 4, ["2 entries for 1 workers"]),
        ("hardware:\n  cpu_threads_bind: 0-\n", 4, ["0-3|4-7", "'0-'"]),
        ("hardware:\n  cpu_threads_bind: 3-0\n", 4, ["0-3|4-7", "'3-0'"]),
        ("media:\n  min_pixels: 2000000\n", 4, ["above max_pixels 1003520"]),
        ("media:\n  videos_kwargs: {min_pixels: 9, max_pixels: 4}\n", 4, ["above max_pixels 4"]),
        ("media:\n  formats: [JPEG, EPS]\n", 4, ["media.formats.1", "'JPEG', 'PNG'", "'EPS'"]),
        ("media:\n  formats: []\n", 4, ["media.formats", "at least 1"]),
        ("media:\n  allowed_local_paths: [pictures]\n", 4, ["from the root", "'pictures'"]),
        ("files:\n  max_bytes: 9\n", 3, ["files.max_file_bytes", "above max_bytes 9"]),
        (
            "hardware: {cpu_kvcache_gib: 1}\nengine: {kv_cache_memory_bytes: 9}\n",
            3,
            ["keep one"],
        ),
        (
            "engine: {enforce_eager: true, compilation_config: {mode: 3}}\n",
            3,
            ["engine.compilation_config", "enforce_eager", "keep one"],
        ),
        ("server: {cors_origins: *}\n", 3, ["*", "quotes"]),
        ("server: {allowed_hosts: @home}\n", 3, ["@", "quotes"]),
    ],
)
def test_fault_is_one_line_with_file_line_and_key(write, text, line, words):
    """File and line stand in front; then the key and its value, what is allowed or was meant."""
    path = write(MINIMAL + text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "model is required"),
        (b"- 1\n", "sections"),
        (b"hello\n", "sections"),
        (b"model: {}\n", "model.model is required"),
        (b"model: {model: ''}\n", "at least 1 character"),
        (b'model: {model: "a\\nb"}\n', "control characters"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"model: \x00\n", "not allowed"),
        (b"[" * 5000, "16 levels"),
        (b"a: " + b"{a: " * 3000, "16 levels"),
        (b"x" * 70000, "at most 65536"),
        (b"model: {model: 9" + b"9" * 5000 + b"}\n", "cannot be read as int"),
        (b"a: &a [1]\nb: &b [*a,*a]\nc: [*b,*b]\n", "aliases"),
    ],
)
def test_file_that_is_no_profile_is_refused(write, content, words):
    """Empty, binary, deeper than 16 levels, larger than 64 KiB: one line says which."""
    assert words in refusal(write(content))


def test_bytes_before_the_document_are_those_of_editors(write):
    """A byte order mark, as Windows editors write, is not an error."""
    assert load_profile(write(b"\xef\xbb\xbf" + MINIMAL.encode())).model.model == "demo"


@pytest.mark.parametrize("name", ["missing.yaml", "/nonexistent/p.yaml", "/dev/zero", "/", "\0/a"])
def test_path_that_cannot_be_read_is_refused(name):
    """A missing file, a device, a folder and a name with a NUL are each told in one line."""
    refusal(name)


def test_misspelt_name_names_the_nearest_profile():
    """The nearest is proposed, and all that ship are listed beside it."""
    message = refusal("mult-gpu")
    assert "did you mean multi-gpu?" in message
    assert all(name in message for name in SHIPPED)


def test_several_faults_are_counted(write):
    """The first is told, the others as ``(and 1 more)`` at the end of the same line."""
    message = refusal(write(MINIMAL + "engine: {seed: a, max_model_len: b}\n"))
    assert message.endswith("(and 1 more)")


def test_overrides_replace_values_and_later_ones_win(write):
    """Values are YAML, lists and mappings too; model, host and port need no section."""
    path = write(MINIMAL + "engine:\n  max_model_len: 1\n")
    profile = load_profile(
        path,
        [
            "engine.max_model_len=4096",
            "engine.max_model_len=8192",
            "media.limit_mm_per_prompt.image=3",
            "model.hf_overrides={text_config: {a: 1}}",
            "server.api_keys=[k1, k2]",
            "model=/models/x",
            "host=0.0.0.0",
            "port=0",
        ],
    )
    assert profile.engine.max_model_len == 8192
    assert profile.media.limit_mm_per_prompt.image == 3
    assert profile.model.hf_overrides == {"text_config": {"a": 1}}
    assert profile.api_keys({}) == {"k1", "k2"}
    assert (profile.model.model, profile.server.host, profile.server.port) == (
        "/models/x",
        "0.0.0.0",
        0,
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.max_model_len", "section.field=value"),
        ("engine.max_model_len=abc", "--set: engine.max_model_len must be a valid integer"),
        ("engine.max_model_length=1", "did you mean max_model_len?"),
        ("max_model_len=1", "belongs to section engine"),
        ("engine.seed.x=1", "engine.seed must be a valid integer"),
        ("model.model.x=1", "is a value, not a section"),
        ("=1", "unknown key"),
        ("engine=1", "section of keys"),
        ("engine.seed=*a", "aliases"),
        ("engine.seed=[", "--set"),
        ("port=abc", "--port: server.port must be a valid integer, is 'abc'"),
        ("port=-1", "--port: server.port must be greater than or equal to 0, is -1"),
        ("server.api_keys=sk-1", "server.api_keys must be a list"),
        ("model.served_model_name=5", "model.served_model_name must be a list, is 5"),
        ("port=99999999999999999999", "less than or equal to 65535"),
        ("host=", "--host: server.host must have at least 1 character"),
        ("hardware.cards=4", "make them equal"),
    ],
)
def test_override_that_cannot_be_used_names_the_option(override, words):
    """The line begins with the option, not with the file, and has the key and what it must be."""
    name = override.partition("=")[0]
    message = refusal("single-3090", [override])
    assert message.startswith(f"--{name}: " if name in BARE_OVERRIDES else "--set")
    assert words in message


def test_fault_in_the_file_is_still_placed_after_overrides(write):
    """An override of another field leaves the file's own fault at its line, here the fourth."""
    path = write(MINIMAL + "engine:\n  seed: x\n")
    assert refusal(path, ["engine.max_model_len=1"]).startswith(f"{path}:4: ")


def load_or_refuse(path: str, overrides: list[str]) -> Profile | None:
    """Load a profile; a refusal has to be one line, and nothing else may be raised."""
    try:
        return load_profile(path, overrides)
    except ProfileError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1
    return None


@settings(deadline=None)  # a busy machine is no fault
@given(st.text(max_size=200))
def test_any_text_as_a_model_is_taken_or_refused(text):
    """What follows ``model=`` is held to the letter, never read as YAML, or refused in one line."""
    profile = load_or_refuse("demo", [f"model={text}"])
    assert profile is None or profile.model.model == text


names = [
    f"{section}.{name}"
    for section, field in Profile.model_fields.items()
    for name in getattr(field.annotation, "model_fields", ())
]


@given(st.sampled_from(names) | st.text(max_size=40), st.text(max_size=40))
def test_any_override_is_taken_or_refused(key, value):
    """Any value for any key, known or not: a profile, or one line of ``ProfileError``."""
    load_or_refuse("demo", [f"{key}={value}"])


@settings(deadline=None)  # a busy machine is no fault
@given(st.binary(max_size=300))
def test_any_bytes_are_taken_or_refused(tmp_path_factory, content):
    """Whatever follows a valid beginning of a file: a profile, or one line of ``ProfileError``."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(MINIMAL.encode() + content)
    load_or_refuse(str(path), [])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@settings(deadline=None)  # a busy machine is no fault
@given(
    st.sampled_from(["model", "hardware", "engine", "server", "media", "files", "limits"]),
    st.data(),
    plain,
)
def test_any_value_in_any_field_is_taken_or_refused(section, data, value):
    """What is taken can also be written as a command line."""
    model = Profile.model_fields[section].annotation
    field = data.draw(st.sampled_from(sorted(model.model_fields)))
    text = yaml.safe_dump(value, allow_unicode=True, width=10**6)
    profile = load_or_refuse("demo", [f"{section}.{field}={text}"])
    assert profile is None or all(profile.vllm_command())


def test_served_name_is_the_last_part_of_the_model():
    """Slashes of either kind part it, one at the end does not; a name that is given goes before."""
    for model, name in [
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL-7B-Instruct"),
        ("/models/x/", "x"),
        ("C:\\models\\x", "x"),
        ("/", "/"),
    ]:
        profile = Profile.model_validate({"model": {"model": model}})
        assert profile.model.served_names == (name,)
    named = Profile.model_validate({"model": {"model": "a/b", "served_model_name": "one"}})
    assert named.model.served_names == ("one",)


def test_demo_is_the_packaged_checkpoint_and_home_is_expanded(monkeypatch):
    """The path is a folder with a ``config.json``; in another's, ``~`` becomes ``HOME``."""
    monkeypatch.setenv("HOME", "/home/someone")
    folder = Path(load_profile("demo").model.path)
    assert (folder / "config.json").is_file()
    profile = Profile.model_validate({"model": {"model": "~/m"}})
    assert profile.model.path == "/home/someone/m"


def test_keys_come_from_profile_file_and_environment(tmp_path):
    """All of them count; commas part the variable's, comments and blanks are no part of a key."""
    file = tmp_path / "keys"
    file.write_text("# operators\nfile-key\n\n  spaced  \n")
    profile = load_profile("demo", ["server.api_keys=[profile-key]", f"server.api_key_file={file}"])
    keys = profile.api_keys({"QWEN2VL_API_KEY": "env-1, env-2,"})
    assert keys == {"profile-key", "file-key", "spaced", "env-1", "env-2"}


@pytest.mark.parametrize("value", [" ", ",", " , "])
def test_variable_without_a_key_is_refused(value):
    """Whoever set it wanted a key; a variable that is empty is what compose files pass for none."""
    with pytest.raises(ProfileError, match="QWEN2VL_API_KEY: holds no key"):
        load_profile("demo").api_keys({"QWEN2VL_API_KEY": value})
    assert load_profile("demo").api_keys({"QWEN2VL_API_KEY": ""}) == frozenset()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"\xff", "UTF-8"), (b"# none\n", "no key"), (b"a b\n", "entry 1")],
)
def test_key_file_that_cannot_be_used_is_refused(tmp_path, content, words):
    """An empty key file must not open the server to everybody."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    profile = load_profile("demo", [f"server.api_key_file={file}"])
    with pytest.raises(ProfileError, match=words):
        profile.api_keys({})


def test_keys_are_never_shown():
    """Not by ``repr``, nor on vLLM's command line, nor where a key of a wrong form is refused."""
    profile = load_profile("demo", ["server.api_keys=[sesame-open]"])
    assert "sesame" not in repr(profile)
    assert "sesame" not in shlex.join(profile.vllm_command())
    for value in ("[sesame open]", "[sesame, 3]", "sesame", "{sesame: 1}"):
        assert "sesame" not in refusal("demo", [f"server.api_keys={value}"])


def test_a_quota_storage_of_a_wrong_form_is_not_shown():
    """Its address may hold a password."""
    told = refusal("demo", ['server.quota_storage=["redis://user:sesame@host"]'])
    assert "server.quota_storage must be a valid string" in told
    assert "sesame" not in told


@pytest.mark.parametrize(
    "word",
    [
        "environment",
        "http://10.0.0.1:3128",
        "https://proxy.example.org/",
        "http://user:sesame@[fd00::1]:3128",
    ],
)
def test_a_proxy_is_an_address_or_the_environments(word):
    """Held as it is; a rehearsal fetches through it as well."""
    profile = load_profile("demo", [f'media.proxy="{word}"'])
    assert profile.media.proxy.get_secret_value() == word
    assert rehearsal(profile).media.proxy == profile.media.proxy
    assert "sesame" not in repr(profile)
    assert load_profile("demo").media.proxy is None


@pytest.mark.parametrize(
    "value",
    [
        "sesame",
        "sesame:3128",
        "Environment",
        "socks5://sesame:1080",
        "http://",
        "http://user:ses ame@host:3128",
        "http://user:sésame@host:3128",
        "http://user:sesame@host:port",
        "http://user:sesame@host:99999",
        "http://user:sesame/x@host:3128",
        "http://host:3128/sesame",
        "http://host:3128?sesame",
        "",
    ],
)
def test_what_is_no_proxy_is_refused_without_being_shown(value):
    """It may hold a password."""
    told = refusal("demo", [f'media.proxy="{value}"'])
    assert "media.proxy must be" in told
    assert "environment" in told
    assert not re.search("s[eé]same|ses ame", told)
    assert "sesame" not in refusal("demo", ["media.proxy=[sesame]"])


def test_log_file_has_a_place_of_its_own(monkeypatch):
    """In ``XDG_STATE_HOME`` under the server's port, unless ``server.log_file`` names a path."""
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert load_profile("demo").log_path == Path("/state/qwen2vl-serve/serve-8000.log")
    profile = load_profile("demo", ["server.log_file=/tmp/x.log"])
    assert profile.log_path == Path("/tmp/x.log")


def test_ray_as_executor_needs_cards():
    """On CPUs it is refused before vLLM is asked; with cards it reaches vLLM by its own name."""
    two = ["engine.distributed_executor_backend=ray", "engine.tensor_parallel_size=2"]
    told = refusal("demo", [*two, "hardware.device=cpu"])
    assert "engine.distributed_executor_backend" in told
    assert "needs NVIDIA cards" in told
    profile = load_profile("demo", [*two, "hardware.device=cuda"])
    assert profile.engine_args()["distributed_executor_backend"] == "ray"
    assert "--distributed-executor-backend ray" in shlex.join(profile.vllm_command())


def test_cpu_settings_reach_vllm_by_environment():
    """The cache in GiB and the workers' CPUs become vLLM's own two variables, and no others."""
    profile = load_profile(
        "single-3090",
        [
            "hardware={device: cpu, cpu_kvcache_gib: 2, cpu_threads_bind: 0-1|2-3}",
            "engine.tensor_parallel_size=2",
        ],
    )
    assert profile.environment() == {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1|2-3",
    }


def test_one_cpu_may_be_named_by_its_number():
    """YAML reads 3 as a number, and 2,3 as text; a truth is no CPU."""
    for written in ("3", "2,3"):
        profile = load_profile("demo", [f"hardware.cpu_threads_bind={written}"])
        assert profile.environment()["VLLM_CPU_OMP_THREADS_BIND"] == written
    assert "hardware.cpu_threads_bind" in refusal("demo", ["hardware.cpu_threads_bind=true"])


def test_several_cpu_workers_are_bound_one_by_one():
    """vLLM looks for as many NUMA nodes as workers unless it is told their processors."""
    profile = load_profile("demo", ["hardware.device=cpu", "engine.tensor_parallel_size=4"])
    bind = profile.environment()["VLLM_CPU_OMP_THREADS_BIND"].split("|")
    usable = sorted(os.sched_getaffinity(0))
    assert bind == [str(usable[worker % len(usable)]) for worker in range(4)]
    assert load_profile("demo").environment() == {}
    assert len(one_cpu_each(9).split("|")) == 9


def test_several_engines_multiply_the_cards():
    """TP × PP × DP; the equal line of vLLM's names them too."""
    profile = load_profile("multi-gpu", ["engine.data_parallel_size=2", "hardware.cards=16"])
    assert profile.workers == 16
    words = profile.vllm_command()
    assert words[words.index("--data-parallel-size") + 1] == "2"
    assert "data_parallel_size 2 = 16" in refusal("multi-gpu", ["engine.data_parallel_size=2"])
    assert rehearsal(profile).workers == 16
    assert profile.environment() == {}


def test_several_cpu_engines_share_the_processors_equally(monkeypatch):
    """Each worker gets CPUs of its own; where there are too few, one in turn."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8, 9, 10})
    assert equal_shares(2) == "0,1,2|3,8,9"
    assert equal_shares(7) == "0|1|2|3|8|9|10"
    assert equal_shares(8) == "0|1|2|3|8|9|10|0"
    overrides = ["hardware.device=cpu", "engine.data_parallel_size=3"]
    assert load_profile("demo", overrides).environment()["VLLM_CPU_OMP_THREADS_BIND"] == (
        "0,1|2,3|8,9"
    )
    assert "auto" in refusal("demo", [*overrides, "hardware.cpu_threads_bind=auto"])
    assert "2 entries for 3 workers" in refusal(
        "demo", [*overrides, "hardware.cpu_threads_bind=0|1"]
    )


def test_section_of_a_field():
    """The section is found by the field's bare name; a name that none has gives None."""
    assert section_of("max_model_len") == "engine"
    assert section_of("nonsense") is None


@pytest.fixture(scope="module")
def vllm() -> Any:
    """vLLM's own parser and argument class; seconds to import, no engine."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())

    def parse(words: list[str]) -> Any:
        arguments = parser.parse_args(words)
        if arguments.model_tag is not None:  # as `vllm serve` does
            arguments.model = arguments.model_tag
        return arguments, AsyncEngineArgs.from_cli_args(arguments)

    def differences(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
        """Fields that differ, but for those that vLLM's parser spells otherwise when unset."""
        found = all_differences(ours, theirs)
        return {name: pair for name, pair in found.items() if unset.get(name) != pair}

    unset = all_differences(AsyncEngineArgs(model="m"), parse(["--model", "m"])[1])
    return SimpleNamespace(parse=parse, engine_args=AsyncEngineArgs, differences=differences)


def all_differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    return {
        field.name: (getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
        if getattr(one, field.name) != getattr(other, field.name)
    }


# The owner's tutorial. Its `--limit_mm_per_prompt image=4` was of vLLM's earlier syntax; the
# parser of 0.32 writes it with a dot.
SINGLE = (
    "--model Qwen/Qwen2-VL-7B-Instruct --dtype auto --port 8000 --limit_mm_per_prompt.image 4 "
    "--max_model_len 8784 --gpu_memory_utilization 0.8"
)
EIGHT = (
    "--model Qwen/Qwen2-VL-7B-Instruct --dtype half --port 8000 --tensor-parallel-size 4 "
    "--pipeline-parallel-size 2 --gpu-memory-utilization 0.7 --limit_mm_per_prompt.image 4 "
    "--max_model_len 8784"
)


@pytest.mark.parametrize(("name", "line"), [("single-3090", SINGLE), ("multi-gpu", EIGHT)])
def test_profile_is_the_tutorials_command_line(vllm, name, line):
    """Only the documented additions differ: video 0, pixel bounds, names for clients."""
    arguments, theirs = vllm.parse(shlex.split(line))
    profile = load_profile(name)
    ours = vllm.engine_args(**profile.engine_args())
    found = vllm.differences(ours, theirs)
    assert found.pop("limit_mm_per_prompt") == ({"image": 4, "video": 0}, {"image": 4})
    assert found.pop("mm_processor_kwargs") == (
        {"min_pixels": 3136, "max_pixels": 1280 * 28 * 28},
        None,
    )
    names, _ = found.pop("served_model_name")
    assert names[-1] == arguments.model == "Qwen/Qwen2-VL-7B-Instruct"
    assert found == {}
    assert arguments.port == profile.server.port


@pytest.mark.parametrize("rehearsed", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_vllm_command_starts_the_same_engine(vllm, name, rehearsed):
    """Its words, read by vLLM's parser, give the arguments, host and port that we serve with."""
    profile = load_profile(name)
    profile = rehearsal(profile) if rehearsed else profile
    words = shlex.split(shlex.join(profile.vllm_command()))
    assert words[:2] == ["vllm", "serve"]
    arguments, theirs = vllm.parse(words[2:])
    assert vllm.differences(vllm.engine_args(**profile.engine_args()), theirs) == {}
    assert (arguments.host, arguments.port) == (profile.server.host, profile.server.port)


EVERYTHING = {
    "model": {
        "model": "/m",
        "served_model_name": ["a", "b"],
        "revision": "r",
        "tokenizer": "/t",
        "download_dir": "/d",
        "dtype": "bfloat16",
        "quantization": "fp8",
        "load_format": "dummy",
        "generation_config": "vllm",
        "hf_overrides": {"text_config": {"x": [1, "it's"]}},
    },
    "engine": {
        "max_model_len": 1,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "data_parallel_size": 5,
        "distributed_executor_backend": "ray",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 5,
        "enforce_eager": False,
        "compilation_config": {"cudagraph_mode": "FULL", "max_cudagraph_capture_size": 8},
        "kv_cache_dtype": "fp8",
        "block_size": 32,
        "kv_cache_memory_bytes": 6,
        "cpu_offload_gb": 1.5,
        "enable_prefix_caching": False,
        "seed": 4294967295,
        "disable_custom_all_reduce": True,
        "mm_processor_cache_gb": 0,
        "mm_encoder_tp_mode": "data",
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": 64,
        "max_cpu_loras": 3,
        "fully_sharded_loras": True,
        "enable_tower_connector_lora": True,
    },
    "adapters": {"lora_modules": {"ocr": "/a/ocr", "tables": "/a/tables"}},
    "server": {"ssl_certfile": "/c", "ssl_keyfile": "/k"},
    "media": {
        "limit_mm_per_prompt": {"image": 0, "video": 1},
        "media_io_kwargs": {"video": {"fps": 1.5, "num_frames": 8}},
    },
}


def test_every_engine_field_reaches_vllm_by_both_ways(vllm):
    """As keyword arguments and as words of ``vllm serve``: every value as it was set."""
    from vllm.config import CompilationConfig

    profile = Profile.model_validate(EVERYTHING)
    for section in ("model", "engine"):
        fields = set(type(getattr(profile, section)).model_fields)
        assert fields == set(EVERYTHING[section])
    ours = vllm.engine_args(**profile.engine_args())
    for section in ("model", "engine"):
        for field, value in EVERYTHING[section].items():
            compiled = field == "compilation_config"
            assert getattr(ours, field) == (CompilationConfig(**value) if compiled else value)
    assert ours.media_io_kwargs == {"video": {"fps": 1.5, "num_frames": 8}}
    arguments, theirs = vllm.parse(profile.vllm_command()[2:])
    assert vllm.differences(ours, theirs) == {}
    assert (arguments.ssl_certfile, arguments.ssl_keyfile) == ("/c", "/k")
    named = {one.name: one.path for one in arguments.lora_modules}
    assert named == {"ocr": "/a/ocr", "tables": "/a/tables"}


def test_choices_are_vllms(vllm):
    """A value that a profile accepts is one that this vLLM knows."""
    from vllm.config.cache import CacheDType
    from vllm.config.lora import MaxLoRARanks
    from vllm.config.model import ModelDType
    from vllm.config.multimodal import MMEncoderTPMode
    from vllm.model_executor.layers.quantization import QuantizationMethods
    from vllm.model_executor.model_loader import LoadFormats

    assert set(get_args(profile_sections.DType)) == set(get_args(ModelDType))
    assert set(get_args(profile_sections.Quantization)) <= set(get_args(QuantizationMethods))
    assert set(get_args(profile_sections.LoadFormat)) <= set(get_args(LoadFormats))
    assert set(get_args(profile_sections.KVCacheDType)) <= set(get_args(CacheDType))
    assert set(get_args(profile_sections.LoRARank)) == set(get_args(MaxLoRARanks))
    mode = profile_sections.EngineSection.model_fields["mm_encoder_tp_mode"].annotation
    assert set(re.findall(r"'(\w+)'", str(mode))) == set(get_args(MMEncoderTPMode))
