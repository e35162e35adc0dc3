"""The Ray instance that the tests of a process share: starting it is dear."""

from __future__ import annotations


def start(gpus: int = 0) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
