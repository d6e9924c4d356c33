"""``python -m tests.fleet_process PORT OPTIONS``: a fleet on a Ray cluster of its own, on loopback.

OPTIONS are ``FleetOptions`` as JSON, and ``seam``. Lines on standard input are commands:
``deploy`` starts every process anew, as an operator's new version does, with the options that
follow as JSON; the end of input ends it. It says ``ready`` after the start and after each command.
"""

from __future__ import annotations

import json
import os
import sys

TRIES = 5


def main(port: str, given: str) -> int:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_open_telemetry": "0"}
    fields = json.loads(given)
    import ray
    from ray import serve

    from qwen2vl_serve.fleet.application import SEAM, application
    from qwen2vl_serve.fleet.options import FleetOptions

    seam = fields.pop("seam", SEAM)
    options = FleetOptions(**fields)
    start_ray()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(application(options, seam), name="fleet")
    print("ready", flush=True)
    for line in sys.stdin:
        if line.startswith("deploy"):
            options = options.model_copy(update=json.loads(line.removeprefix("deploy") or "{}"))
            serve.run(application(options, seam), name="fleet")
        print("ready", flush=True)
    serve.shutdown()
    ray.shutdown()
    return 0


def start_ray() -> None:
    """Start a cluster; on a busy machine Ray's own limit, 15 s for its agent, needs some tries."""
    import ray

    for _ in range(TRIES):
        try:
            ray.init(
                address="local",
                num_cpus=16,
                object_store_memory=100_000_000,
                include_dashboard=False,
                log_to_driver=False,
            )
        except Exception as error:  # Ray raises no narrower one
            print(f"again: {error}", flush=True)
            ray.shutdown()
        else:
            return
    raise SystemExit("Ray does not start")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
