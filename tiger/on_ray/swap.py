"""Change the model of a running service, without a failed or a waiting request; or go back to the one before.

    tiger swap runs/model-1a2b3c4d
    tiger swap --back

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
from tiger.core.config import MAX_LISTED
from tiger.core.errors import ArtifactError, ConfigError, ResourceError, TigerError, last_line
from tiger.on_ray import cluster
from tiger.on_ray.failures import RayError, to_tiger_error
from tiger.on_ray.serve import IMPORT_PATH

log = logging.getLogger(__name__)

LOAD_SECONDS = 600.0  # that all replicas have to load a model


def swap(model: str | None) -> dict[str, Any]:
    """Change the model of the service on this cluster.

    Args:
        model: folder or URI of the model artifact; None: the model before the current one.

    Returns:
        The new model (`model`), the one before (`previous`), the number of replicas and the seconds it took.

    Raises:
        ConfigError: there is no model before the current one.
        ArtifactError: it is not a model artifact, or a replica refuses it; the service is as before.
        ResourceError: no service runs there, or its replicas do not answer.
    """
    begin = time.monotonic()
    applications = _applications()
    name = next(name for name, each in applications.items() if each["import_path"] == IMPORT_PATH)
    server = _server(applications[name])
    current = server["user_config"]
    wanted = current.get("previous") if model is None else open_artifact(model, expected_kind="model").home.uri
    if wanted is None:
        raise ConfigError("the service has had no other model; name the model: tiger swap MODEL")
    handle = serve.get_deployment_handle("Server", app_name=name)
    if wanted == current["model"]:
        log.info("%s answers already", wanted)
        return {"model": wanted, "previous": current.get("previous"), "replicas": len(_states(handle)), "seconds": 0.0}
    _prepare(handle, wanted, current["model"])
    server["user_config"] = {"model": wanted, "previous": current["model"]}
    serve.context._get_global_client().deploy_apps(
        ServeDeploySchema.model_validate({"applications": list(applications.values())})
    )
    replicas = _wait_until_used(handle, name, wanted)
    seconds = round(time.monotonic() - begin, 1)
    log.info("%s answers on %d replicas, %.1f s; to go back: tiger swap --back", wanted, replicas, seconds)
    return {"model": wanted, "previous": current["model"], "replicas": replicas, "seconds": seconds}


def _prepare(handle: Any, wanted: str, current: str) -> None:
    try:
        refusals = handle.broadcast("prepare", wanted).results(timeout_s=LOAD_SECONDS)
    except TimeoutError:
        raise ResourceError(f"{wanted} was not loaded within {LOAD_SECONDS:g} s; {current} keeps answering") from None
    if reasons := [reason for reason in refusals if reason]:
        handle.broadcast("discard").results(timeout_s=60)
        raise ArtifactError(
            f"{len(reasons)} of {len(refusals)} replicas refuse the model, and {current} keeps answering: {reasons[0]}"
        )


def _wait_until_used(handle: Any, application: str, wanted: str) -> int:
    """Wait until all replicas answer with a model; return their number.

    Raises:
        ResourceError: one does not take it.
    """
    deadline = time.monotonic() + LOAD_SECONDS
    while True:
        server = serve.status().applications[application].deployments["Server"]
        states = _states(handle)  # without replicas that are being reconfigured or started; then it is not healthy
        if server.status == "HEALTHY" and states and all(state["model"] == wanted for state in states):
            return len(states)
        refused = [state["swap"] for state in states if state["swap"] and state["swap"]["state"] == "refused"]
        if refused and refused[0]["model"] == wanted:
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
    """Change the model; print one JSON object; return the exit code."""
    parser = argparse.ArgumentParser(
        "tiger swap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", help="folder or URI of a model artifact")
    which.add_argument("--back", action="store_true", help="go back to the model before")
    options = parser.parse_args(arguments)
    logs.configure_console(debug=False)
    try:
        result = swap(None if options.back else options.model)
    except (TigerError, RayError) as failure:
        error = to_tiger_error(failure)
        print(logs.redact(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except (RuntimeError, RayServeException) as failure:  # of Serve's controller and its handles
        print(logs.redact(f"error: Ray Serve: {last_line(failure)}"), file=sys.stderr)
        return ResourceError.exit_code
    print(json.dumps(result), flush=True)
    return 0
