"""Replicas of the server, on one machine or many, by Ray Serve: the same application in each.

Ray's proxy takes the requests and hands each to the replica with the fewest in hand. What one
replica remembers (conversations, prefixes in memory) others do not.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from treadle.core.errors import TreadleError
from treadle.serving.app import build
from treadle.serving.config import Serve
from treadle.serving.pool import Offer


def application(offers: Sequence[Offer], config: Serve, *, replicas: int, cores: float) -> Any:
    """What `ray.serve.run` takes, also from a configuration of one's own for a cluster.

    Args:
        cores: that Ray sets aside for each replica.

    Raises:
        TreadleError: Ray Serve is not installed.
    """
    library = _library()

    class Replica:
        """Its methods are the application's paths."""

    deployment = library.deployment(
        name="treadle",
        num_replicas=replicas,
        max_ongoing_requests=config.limits.requests,
        graceful_shutdown_timeout_s=config.drain_seconds,
        ray_actor_options={"num_cpus": cores},
    )
    return deployment(library.ingress(partial(_asgi, tuple(offers), config))(Replica)).bind()


def serve(
    offers: Sequence[Offer], config: Serve, *, replicas: int, ready: Callable[[], None]
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, from a Ray cluster or one begun on this machine.

    Raises:
        TreadleError: Ray Serve is not installed, or the port is to be found by itself.
    """
    library = _library()
    import ray

    if not config.port:
        raise TreadleError("Ray Serve needs a port of your choice: name one with --port")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, configure_logging=False)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    cores = max(1.0, ray.cluster_resources().get("CPU", 1.0)) / (replicas + 1)
    try:
        library.start(http_options={"host": config.host, "port": config.port})
        library.run(application(offers, config, replicas=replicas, cores=cores), name="treadle")
        ready()
        stopped.wait()
    finally:
        library.shutdown()
        ray.shutdown()


def _asgi(offers: Sequence[Offer], config: Serve) -> ASGIApp:
    """A replica's own application; called in its process."""
    return build(offers, config).gate


def _library() -> Any:
    try:
        from ray import serve
    except ImportError:
        raise TreadleError(
            "replicas need Ray Serve, which is not installed: pip install 'treadle[ray]'"
        ) from None
    return serve
