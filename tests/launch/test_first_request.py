"""The address that is told; ``test_serve`` runs the command that is printed with it."""

from __future__ import annotations

from qwen2vl_serve.launch.first_request import server_url
from qwen2vl_serve.profile import load_profile


def test_the_address_is_one_that_a_client_can_use() -> None:
    """Listening everywhere is told as this machine's own address; IPv6 stands in brackets."""
    everywhere, six = ["host=0.0.0.0", "port=80"], ["host=::1", "port=80"]
    assert server_url(load_profile("demo", everywhere)) == "http://127.0.0.1:80"
    assert server_url(load_profile("demo", six)) == "http://[::1]:80"
