"""HTTP serving of a trained model: a Ray Serve application, deployed from a configuration as `serve deploy` takes it.

Ray's token does not protect Serve's port, and Serve accepts requests of any size. So a bearer token is required unless
the port is bound to loopback, the size of request bodies and the time to read them are limited, and so is `k`. Bodies
are limited in the replicas and, if this process starts Ray, in Serve's proxy in front of them, which buffers bodies
while all replicas are busy; for other clusters see `tiger.serving.body_limit`.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ServeDeploySchema

from tiger.core.artifacts import Artifact
from tiger.core.config import MAX_LISTED, build
from tiger.core.errors import ConfigError, ResourceError, SecurityError, last_line
from tiger.models.decoding import DecodingConfig
from tiger.on_ray import cluster, placement
from tiger.on_ray.replica import ENVIRONMENT, TOKEN_FILE, ModelConfig, deployment
from tiger.run import ResourcesConfig, ServeConfig
from tiger.serving.body_limit import PROXY_CALLBACK, PROXY_MIDDLEWARES
from tiger.serving.guard import is_loopback, read_token
from tiger.serving.model import ModelVersion

log = logging.getLogger(__name__)

# For the Serve of a Ray that this process starts later. A proxy that is not ready in time is killed, and on a busy
# machine Ray's default of 5 s is not enough to start one.
os.environ.setdefault(PROXY_CALLBACK, PROXY_MIDDLEWARES)
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")

NAME = "tiger"
"""Name of the application."""

IMPORT_PATH = "tiger.on_ray.serve:application"

_STARTS = 3


def application(arguments: dict[str, Any]) -> serve.Application:
    """Build the application of a Serve configuration's `import_path`.

    Its `args` are options of `decoding`, and: `model` and `semantic_ids`, URIs, unless the deployment's `user_config`
    names them, which can be changed without new replicas; `token_needed`, true unless it says otherwise, since the
    service's port is open to its network; `allowed_origins`.

    Raises:
        ConfigError: an argument is unknown, or out of its range.
    """
    given = dict(arguments)
    named = {key: given.pop(key) for key in ModelVersion.model_fields if key in given}
    token_needed = str(given.pop("token_needed", True)).lower()
    origins = given.pop("allowed_origins", [])
    if token_needed not in ("true", "false"):
        raise ConfigError(f"args of the application: token_needed = {token_needed}: must be true or false")
    options = build(DecodingConfig, given, "decoding.").model_dump(mode="json")
    own = deployment
    if named:
        own = own.options(user_config=build(ModelConfig, named, "args.").model_dump(exclude_none=True))
    return own.bind(options, token_needed=token_needed == "true", allowed_origins=origins)


# --- configuration ----------------------------------------------------------------------------------------------


def deploy_config(
    model: Artifact,
    config: ServeConfig,
    decoding: DecodingConfig,
    *,
    cpus: float,
    gpus: float,
    replicas: int,
    semantic_ids: Artifact | None = None,
) -> dict[str, Any]:
    """Return the configuration of Serve that serves a model, as `serve deploy` takes it in YAML.

    Args:
        model: the model artifact.
        config: address, limits, token, autoscaling.
        decoding: options of lists.
        cpus: CPUs per replica.
        gpus: GPUs, or the fraction of one, per replica.
        replicas: number of replicas; with `config.max_replicas` the minimum.
        semantic_ids: those of an append to the model's; None: those of its training.
    """
    token = {TOKEN_FILE: str(Path(config.token_file).resolve())} if config.token_file else {}
    http = {"host": config.host, "port": config.port, "request_timeout_s": config.request_seconds}
    if config.tls_cert_file and config.tls_key_file:
        files = {"ssl_keyfile": config.tls_key_file, "ssl_certfile": config.tls_cert_file}
        http |= {key: str(Path(file).resolve()) for key, file in files.items()}
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if config.max_replicas is not None and config.max_replicas > replicas:
        limits = {"min_replicas": replicas, "max_replicas": config.max_replicas, "target_ongoing_requests": 32}
        scaling = {"autoscaling_config": limits}
    server = {
        "name": "Server",
        "user_config": _version(model, semantic_ids).model_dump(exclude_none=True),
        "max_queued_requests": config.max_queued_requests,
        "max_surge_percent": 100,
        "ray_actor_options": {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": ENVIRONMENT | token},
        },
    } | scaling
    changed = decoding.model_dump(mode="json", exclude_defaults=True)
    args = changed | {"token_needed": config.token_file is not None, "allowed_origins": config.allowed_origins}
    return {
        "proxy_location": "EveryNode",
        "http_options": http,
        "applications": [
            {"name": NAME, "route_prefix": "/", "import_path": IMPORT_PATH, "args": args, "deployments": [server]}
        ],
    }


def _version(model: Artifact, semantic_ids: Artifact | None) -> ModelVersion:
    return ModelVersion(model=model.home.uri, semantic_ids=semantic_ids and semantic_ids.home.uri)


def write_config(
    model: Artifact, config: ServeConfig, decoding: DecodingConfig, semantic_ids: Artifact | None = None
) -> None:
    """Write the configuration for `serve deploy` to `config.config_file`; arguments are those of `deploy_config`.

    Raises:
        SecurityError: the port would be open beyond loopback without a token.
        ResourceError: the file cannot be written.
    """
    _check_access(config)
    resources = config.resources
    content = deploy_config(
        model, config, decoding, cpus=resources.cpus or 1.0, gpus=resources.gpus or 0.0,
        replicas=resources.num_workers or 1, semantic_ids=semantic_ids,
    )  # fmt: skip
    ServeDeploySchema.model_validate(content)
    path = Path(config.config_file or "")
    try:
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}; set serve.config_file") from None
    log.info("%s is written: start it with serve deploy %s, on a cluster that Serve runs on", path, path)


def _check_access(config: ServeConfig) -> None:
    """Check who could reach the service, and the files that protect it.

    Raises:
        ConfigError: of certificate and key only one is set.
        SecurityError: the port would be open without a token, or a file cannot be used.
    """
    if (config.tls_cert_file is None) != (config.tls_key_file is None):
        raise ConfigError("serve.tls_cert_file and serve.tls_key_file belong together; set both, or none")
    # The HAProxy of Ray Serve listens on all addresses, regardless of the configured host.
    is_open = not is_loopback(config.host) or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    if is_open and not config.token_file:
        raise SecurityError(
            f"serve.host = {config.host} is open to others: set serve.token_file, or serve on 127.0.0.1"
        )
    read_token(config.token_file)  # fail here and not in replicas, which would be restarted repeatedly
    for key in ("tls_cert_file", "tls_key_file"):
        file = getattr(config, key)
        if file and not os.access(file, os.R_OK):
            raise SecurityError(f"serve.{key} = {file} cannot be read")


# --- running ----------------------------------------------------------------------------------------------------


def serve_forever(
    model: Artifact,
    config: ServeConfig,
    decoding: DecodingConfig,
    scale: ResourcesConfig,
    semantic_ids: Artifact | None = None,
) -> None:
    """Serve a model artifact on this cluster until interrupted; requests in progress are finished first.

    If Serve runs on this cluster already, at the same address and without applications, it is used and left running.

    Args:
        model: the model artifact.
        config: address, limits, token, replicas.
        decoding: options of lists.
        scale: resources of the cluster.
        semantic_ids: those of an append to the model's; None: those of its training.

    Raises:
        SecurityError: the port would be open beyond loopback without a token, the token file can be read by others, or
            Serve runs already at another address or for another application.
        ResourceError: the cluster has too few CPUs or GPUs for the replicas, the port is in use, or the replicas do not
            start.
    """
    _check_access(config)
    cluster.connect(model.home.parent)
    cluster.wait_for_gpus(scale.gpus, "serve", scale.wait_minutes)
    resources = config.resources
    plan = placement.plan_replicas(
        cluster.shape(), replicas=resources.num_workers or 1, cpus=resources.cpus or 1.0, gpus=resources.gpus,
        scale_gpus=scale.gpus,
    )  # fmt: skip
    cluster.wait_for(plan.at_once, "serve", scale.wait_minutes)
    content = deploy_config(
        model, config, decoding, cpus=plan.bundle.cpus, gpus=plan.bundle.gpus, replicas=plan.minimum,
        semantic_ids=semantic_ids,
    )  # fmt: skip
    if environment := dict(ray.get_runtime_context().runtime_env):  # of a submitted job: its working directory
        content["applications"][0]["runtime_env"] = environment
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how a supervisor interrupts; Ray has set its own before
    was_running = _require_no_other_address(config)
    _start(config, content["http_options"], was_running)
    _require_no_other_address(config)  # if another server has started Serve meanwhile, our options were ignored
    try:
        _client().deploy_apps(ServeDeploySchema.model_validate(content))
        _wait_until_running()
        scheme = "https" if config.tls_cert_file else "http"
        address = f"{scheme}://{config.host}:{config.port}"
        log.info("serving %s on %s/recommend, with a page at %s/", _version(model, semantic_ids), address, address)
        log.info("another model: RAY_ADDRESS=%s tiger swap MODEL", ray.get_runtime_context().gcs_address)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        log.info("serving: stopped")
    finally:
        _stop(was_running)


def _start(config: ServeConfig, http: dict[str, Any], was_running: bool) -> None:
    """Start Serve; again if its proxy does not come up, which happens on a busy machine.

    Raises:
        ResourceError: the port is in use, or all starts failed.
    """
    for attempt in range(1, _STARTS + 1):
        try:
            serve.start(http_options=http)
            return
        except (RuntimeError, OSError, TimeoutError, RayError) as error:
            if not was_running:
                _stop(was_running)
            reason = last_line(error).removeprefix("RuntimeError: ").rstrip(".")
            where = f"{config.host}:{config.port}"
            if "bind" in reason:
                raise ResourceError(f"{where} cannot be served: {reason}; set serve.port") from error
            if attempt == _STARTS:
                raise ResourceError(
                    f"Ray Serve does not start on {where}, tried {_STARTS} times: {reason} (Ray's logs: "
                    f"{cluster.log_folder()})"
                ) from error
            log.warning("Ray Serve did not start on %s (%s); trying again", where, reason)


def _wait_until_running() -> None:
    """Wait until the application answers.

    Raises:
        ResourceError: its replicas do not start; the message is the reason of the last one.
    """
    while True:
        found = serve.status().applications.get(NAME)
        status = found.status.value if found else "NOT_STARTED"
        if status == "RUNNING":
            _client().wait_for_proxies_serving(wait_for_applications_running=True)
            return
        if found and status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reports = [each.message for each in found.deployments.values() if each.message] or [found.message]
            raise ResourceError(f"the service does not start: {_reason(reports[0])}")
        time.sleep(0.2)


def _reason(message: str) -> str:
    """Return the error of a replica from Serve's report, which ends in a traceback and may be cut."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("tiger.core.errors.")]
    return errors[-1].partition(": ")[2] if errors else lines[-1] if lines else "no reason was given"


def _client() -> Any:
    return serve.context._get_global_client()


def _stop(was_running: bool) -> None:
    """Stop the application; stop Serve as a whole only if it was not running before and has no other application."""
    if was_running or set(serve.status().applications) - {NAME}:
        serve.delete(NAME)
    else:
        serve.shutdown()


def _require_no_other_address(config: ServeConfig) -> bool:
    """Return whether Serve runs on this cluster already; its address cannot be changed, and others may depend on it.

    Raises:
        SecurityError: it listens on another address than the one that was checked, or serves an application.
    """
    client = serve.context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return False
    options = client.http_config
    if (options.host, options.port) != (config.host, config.port):
        raise SecurityError(
            f"Ray Serve runs on this cluster already, on {options.host}:{options.port}, but serve.host and serve.port "
            f"are {config.host}:{config.port}: set them to that address, with a token if it is open to others, or "
            "stop that Serve (`serve shutdown`)"
        )
    if names := list(serve.status().applications):
        raise SecurityError(
            f"Ray Serve runs {', '.join(names[:MAX_LISTED])} on this cluster already, at the same address; "
            "use another cluster, or stop that application"
        )
    return True
