"""Change the model of a running service, or its items, without a failed or a waiting request; or go back.

    tiger swap runs/model-1a2b3c4d
    tiger swap --semantic-ids runs/semantic_ids-5e6f7a8b
    tiger swap --back

With the semantic IDs of an append (`tiger append`) the service takes its new, changed and deleted items; without MODEL
it keeps the model that answers. MODEL alone has the items of its training. --back returns to the model and the items
before.

All replicas load the model next to the one that answers, compare its files with their checksums, and try it. If one of
them refuses it, nothing changes. RAY_ADDRESS names the cluster, as `tiger serve` reports it; by default the Ray that
runs on this machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from typing import Any

from ray import serve
from ray._private import services
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.schema import ServeDeploySchema

from tiger.core import logs
from tiger.core.artifacts import open_artifact
from tiger.core.config import MAX_LISTED, build
from tiger.core.errors import ArtifactError, ConfigError, ResourceError, TigerError, last_line
from tiger.data.grown_catalog import KIND, open_append
from tiger.on_ray import cluster
from tiger.on_ray.failures import RayError, to_tiger_error
from tiger.on_ray.replica import ModelConfig
from tiger.on_ray.serve import IMPORT_PATH
from tiger.serving.model import ModelVersion

log = logging.getLogger(__name__)

LOAD_SECONDS = 600.0  # that all replicas have to load a model


def swap(model: str | None = None, semantic_ids: str | None = None) -> dict[str, Any]:
    """Change the model of the service on this cluster, or the items that it recommends.

    Args:
        model: folder or URI of the model artifact; None: the one that answers.
        semantic_ids: folder or URI of the semantic IDs of an append to the model's; None: those of its training.
            Without both, the service returns to what answered before.

    Returns:
        What answers now (`model`, `semantic_ids`) and before (`previous`), the number of replicas, and the seconds it
        took.

    Raises:
        ConfigError: nothing answered before, or the semantic IDs are not in the model's folder.
        ArtifactError: one is not an artifact of its kind, the semantic IDs continue those of another model, or a
            replica refuses them; the service is as before.
        ResourceError: no service runs there, or its replicas do not answer.
    """
    begin = time.monotonic()
    applications = _applications()
    name = next(name for name, each in applications.items() if each["import_path"] == IMPORT_PATH)
    server = _server(applications[name])
    current = build(ModelConfig, server["user_config"], "user_config.")
    before, wanted = current.version, _wanted(current, model, semantic_ids)
    handle = serve.get_deployment_handle("Server", app_name=name)
    if wanted == before:
        log.info("%s answers already", wanted)
        return _result(current, len(_states(handle)), begin)
    _prepare(handle, wanted, before)
    changed = ModelConfig(**dict(wanted), previous=before)
    server["user_config"] = changed.model_dump(exclude_none=True)
    serve.context._get_global_client().deploy_apps(
        ServeDeploySchema.model_validate({"applications": list(applications.values())})
    )
    result = _result(changed, _wait_until_used(handle, name, wanted), begin)
    back = "to go back: tiger swap --back"
    log.info("%s answers on %d replicas, %.1f s; %s", wanted, result["replicas"], result["seconds"], back)
    return result


def _wanted(current: ModelConfig, model: str | None, semantic_ids: str | None) -> ModelVersion:
    """Return what is to answer, with the URIs of its artifacts; see `swap`."""
    if model is None and semantic_ids is None:
        if current.previous is None:
            raise ConfigError(
                "nothing answered before; name what is to answer: tiger swap MODEL, or tiger swap --semantic-ids FOLDER"
            )
        return current.previous
    artifact = open_artifact(model or current.model, expected_kind="model")
    appended = open_append(semantic_ids, artifact, "--semantic-ids").get(KIND)
    return ModelVersion(model=artifact.home.uri, semantic_ids=appended and appended.home.uri)


def _result(answers: ModelConfig, replicas: int, begin: float) -> dict[str, Any]:
    return answers.model_dump() | {"replicas": replicas, "seconds": round(time.monotonic() - begin, 1)}


def _prepare(handle: Any, wanted: ModelVersion, current: ModelVersion) -> None:
    try:
        refusals = handle.broadcast("prepare", **dict(wanted)).results(timeout_s=LOAD_SECONDS)
    except TimeoutError:
        raise ResourceError(f"{wanted} was not loaded within {LOAD_SECONDS:g} s; {current} keeps answering") from None
    if reasons := [reason for reason in refusals if reason]:
        handle.broadcast("discard").results(timeout_s=60)
        raise ArtifactError(
            f"{len(reasons)} of {len(refusals)} replicas refuse the model, and {current} keeps answering: {reasons[0]}"
        )


def _wait_until_used(handle: Any, application: str, wanted: ModelVersion) -> int:
    """Wait until all replicas answer with a model; return their number.

    Raises:
        ResourceError: one does not take it.
    """
    deadline, taken = time.monotonic() + LOAD_SECONDS, wanted.model_dump().items()
    while True:
        server = serve.status().applications[application].deployments["Server"]
        states = _states(handle)  # without replicas that are being reconfigured or started; then it is not healthy
        if server.status == "HEALTHY" and states and all(taken <= state.items() for state in states):
            return len(states)
        changes = [state["swap"] for state in states if state["swap"] and taken <= state["swap"].items()]
        if refused := [change for change in changes if change["state"] == "refused"]:
            raise ResourceError(f"a replica refuses {wanted}: {refused[0]['reason']}; go back with tiger swap --back")
        if time.monotonic() > deadline:
            raise ResourceError(f"not all replicas answer with {wanted} after {LOAD_SECONDS:g} s; see serve status")
        time.sleep(0.1)


def _states(handle: Any) -> list[dict[str, Any]]:
    """Return the state of every replica that can be asked; of none while Serve reconfigures the only one."""
    try:
        states: list[dict[str, Any]] = handle.broadcast("state").results(timeout_s=60)
    except DeploymentUnavailableError:
        return []
    except TimeoutError:
        raise ResourceError("the replicas of the service do not answer; see `serve status`") from None
    return states


def _server(application: dict[str, Any]) -> dict[str, Any]:
    """Return the deployment of an application's configuration whose `user_config` names the model.

    Raises:
        ConfigError: it is named by `args`, which cannot be changed without new replicas.
    """
    servers: list[dict[str, Any]] = [each for each in application["deployments"] if each["name"] == "Server"]
    if not servers or not servers[0].get("user_config"):
        raise ConfigError(
            f"the application {application['name']} does not name its model in the user_config of the deployment "
            "Server, so that it can only be replaced; deploy it with user_config: {model: URI}"
        )
    return servers[0]


def _applications() -> dict[str, dict[str, Any]]:
    """Join the cluster, and return the configurations of its Serve applications, by name.

    Raises:
        ResourceError: no service of ours runs there.
    """
    if not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_ADDRESS"] = _address()
    cluster.connect()
    client = serve.context._get_global_client(raise_if_no_controller_running=False)
    found = client.get_serve_details()["applications"] if client else {}
    configs = {name: each["deployed_app_config"] for name, each in found.items() if each.get("deployed_app_config")}
    if not any(each["import_path"] == IMPORT_PATH for each in configs.values()):
        others = f"; Serve runs {', '.join(list(found)[:MAX_LISTED])} there" if found else ""
        raise ResourceError(f"no service of ours runs on {os.environ['RAY_ADDRESS']}{others}; start one: tiger serve")
    return configs


def _address() -> str:
    """Return the address of the Ray on this machine.

    Raises:
        ResourceError: none runs, or several do.
    """
    found: list[str] = sorted(services.find_gcs_addresses())
    if len(found) != 1:
        which = f"several Rays run on this machine ({', '.join(found)})" if found else "no Ray runs on this machine"
        raise ResourceError(f"{which}: set RAY_ADDRESS to the address that tiger serve reports")
    return found[0]


def main(arguments: list[str]) -> int:
    """Change what answers; print one JSON object; return the exit code."""
    parser = argparse.ArgumentParser(
        "tiger swap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or URI of a model artifact; none: the one that answers")
    parser.add_argument(
        "--semantic-ids", metavar="FOLDER", help="semantic IDs of an append to the model's; none: those of its training"
    )
    parser.add_argument("--back", action="store_true", help="go back to the model and the semantic IDs before")
    options = parser.parse_args(arguments)
    if options.back == bool(options.model or options.semantic_ids):
        parser.error("give a model, --semantic-ids, or both; or --back alone")
    logs.configure_console(debug=False)
    try:
        result = swap(options.model, options.semantic_ids)
    except (TigerError, RayError) as failure:
        error = to_tiger_error(failure)
        print(logs.redact(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except (RuntimeError, RayServeException) as failure:  # of Serve's controller and its handles
        print(logs.redact(f"error: Ray Serve: {last_line(failure)}"), file=sys.stderr)
        return ResourceError.exit_code
    print(json.dumps(result), flush=True)
    return 0
