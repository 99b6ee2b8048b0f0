"""The server of `optimum-cli lfm2 serve` on many machines, as a deployment of Ray Serve.

  serve run examples.ray.serve:build models=lfm2_onnx cores=4 most=8

Each replica is the same server with a session of its own. Ray starts more of them while requests wait, and ends some
when they do not. Requests with the same `x-session-id` go to the same replica, which has read the chat already.
"""

import os
from typing import Any

from onnxruntime import SessionOptions
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from optimum_lfm2.runtime.scheduler import Limits
from optimum_lfm2.serving.serve import MEGABYTE, check_server
from optimum_lfm2.serving.server import Bounds, Settings, build_app, load_all


ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"  # a session has its replica


class Options(BaseModel):
    """What `serve run` takes as name=value.

    Attributes:
        models: exported folders, separated by commas, each with a name before it if it has `=`. They have to lie at the
            same path on every machine.
        file_name: the model's file, where a folder has several.
        cores: of a replica.
        least, most: how many replicas there are.
        rows: how many requests share the calls of a replica. Ray adds replicas when each has more than that.
        tokens: rows times columns of a replica, as `--max-tokens`.
        queue: how many requests wait in a replica. Beyond that they wait in Ray's proxy.
        cache_memory: megabytes for what a replica has read.
        new_tokens: the most that a request may ask for.
        body: the most megabytes of a request.
    """

    models: str
    file_name: str | None = None
    cores: int = 2
    least: int = 1
    most: int = 4
    rows: int = 16
    tokens: int = 32768
    queue: int = 16
    cache_memory: int = 512
    new_tokens: int = 4096
    body: int = 32


class Named:
    """An application whose answers say in `x-replica` who gave them."""

    def __init__(self, app: Any, name: str) -> None:
        self._app, self._header = app, (b"x-replica", name.encode())

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def sent(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        await self._app(scope, receive, sent)


@serve.ingress()
class Server:
    """A replica.

    Args:
        options: those of the application.
        key: what `Authorization: Bearer` has to say, or None.
    """

    def __init__(self, options: Options, key: str | None) -> None:
        check_server()
        session = SessionOptions()
        session.intra_op_num_threads = options.cores  # otherwise it takes all cores of the machine
        loaded = load_all(options.models.split(","), options.file_name, session)
        limits = Limits(options.rows, options.tokens, options.queue, options.cache_memory * MEGABYTE)
        bounds = Bounds(None, options.new_tokens)
        self._app, self._state = build_app(loaded, Settings("", 0, key, options.body * MEGABYTE, bounds, limits))

    def __serve_build_asgi_app__(self) -> Any:
        return Named(self._app, serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if not self._state.is_cb_alive():
            raise RuntimeError("The model takes no requests any more.")

    def __del__(self) -> None:
        self._state.shutdown()


def build(options: Options) -> Application:
    """Return the application. LFM2_API_KEY is what clients have to know."""
    deployment = serve.deployment(
        Server,
        name="lfm2",
        ray_actor_options={"num_cpus": options.cores},
        max_ongoing_requests=options.rows + options.queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.least, max_replicas=options.most, target_ongoing_requests=options.rows
        ),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        graceful_shutdown_timeout_s=300,
    )
    return deployment.bind(options, os.environ.get("LFM2_API_KEY"))
