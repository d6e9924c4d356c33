"""``python -m tests.fleet_process PORT OPTIONS``: a fleet on a Ray cluster of its own, on loopback.

OPTIONS are ``FleetOptions`` as JSON, and ``seam``. Lines on standard input are commands:
``deploy`` starts every process anew, as an operator's new version does; the end of input ends it.
It says ``ready`` after the start and after each command.
"""

from __future__ import annotations

import json
import os
import sys


def main(port: str, given: str) -> int:
    # A machine that is busy with other tests starts Ray's processes slowly.
    os.environ |= {"RAY_raylet_start_wait_time_s": "120", "RAY_agent_register_timeout_ms": "120000", "RAY_USAGE_STATS_ENABLED": "0"}
    fields = json.loads(given)
    import ray
    from ray import serve

    from qwen2vl_serve.fleet.application import SEAM, FleetOptions, application

    seam = fields.pop("seam", SEAM)
    options = FleetOptions(**fields)
    ray.init(
        address="local",
        num_cpus=16,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(application(options, seam), name="fleet")
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "deploy":
            serve.run(application(options, seam), name="fleet")
        print("ready", flush=True)
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
