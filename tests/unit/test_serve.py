"""How a service is deployed: its configuration, its arguments, who may reach it. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.exceptions import ActorDiedError
from ray.serve.schema import ServeDeploySchema

from tests.paths import ROOT
from tests.serving import token_file
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.core.errors import ConfigError, ResourceError, SecurityError
from tiger.core.storage import Folder
from tiger.models.decoding import DecodingConfig
from tiger.on_ray.replica import TOKEN_FILE, deployment
from tiger.on_ray.serve import _reason, application, serve_forever, write_config
from tiger.run import ResourcesConfig, RunConfig, ServeConfig


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "tiger.example.org"])
def test_an_open_port_needs_a_token(host: str) -> None:
    with pytest.raises(SecurityError, match="is open to others: set serve.token_file"):
        serve_forever(None, ServeConfig(host=host), DecodingConfig(), ResourcesConfig())  # type: ignore[arg-type]


def test_ray_s_other_proxy_ignores_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(SecurityError, match="set serve.token_file"):
        serve_forever(None, ServeConfig(), DecodingConfig(), ResourcesConfig())  # type: ignore[arg-type]


def test_files_for_https_must_be_there() -> None:
    config = ServeConfig(tls_cert_file="/none/cert.pem", tls_key_file="/none/key.pem")
    with pytest.raises(SecurityError, match=r"serve.tls_cert_file = /none/cert.pem cannot be read"):
        serve_forever(None, config, DecodingConfig(), ResourcesConfig())  # type: ignore[arg-type]
    config = ServeConfig(tls_key_file="key.pem")
    with pytest.raises(ConfigError, match="serve.tls_cert_file and serve.tls_key_file belong together"):
        serve_forever(None, config, DecodingConfig(), ResourcesConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"modle": "m"}, "unknown key decoding.modle"),
        ({"beam": "ten"}, "decoding.beam"),
        ({"beam": ""}, "decoding.beam"),
        ({"beam": 0}, "decoding.beam"),
        ({"beam": "5.5"}, "decoding.beam"),
        ({"model": ""}, "args.model"),
        ({"token_needed": "maybe"}, "must be true or false"),
    ],
)
def test_arguments_of_an_application_are_checked(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        application(arguments)


def test_an_application_needs_a_token_unless_it_says_otherwise() -> None:
    for arguments, needed in (({}, True), ({"token_needed": False}, False), ({"token_needed": "false"}, False)):
        bound = application({"beam": "20"} | arguments)._bound_deployment
        assert bound.init_kwargs == {"token_needed": needed, "allowed_origins": []}
        assert bound.init_args[0]["beam"] == 20
        assert bound.user_config is None
    assert application({"model": "s3://b/model-1"})._bound_deployment.user_config["model"] == "s3://b/model-1"


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return Artifact(Folder(str(tmp_path / "model-00000000")), {"kind": "model"})


def test_a_configuration_for_serve_deploy_says_all(model: Artifact, tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch()
    path, token = tmp_path / "serve.yaml", token_file(tmp_path)
    overrides = [
        "serve.host=0.0.0.0", "serve.port=9000", f"serve.token_file={token}", "serve.max_replicas=4",
        "serve.resources.max_workers=2", "serve.resources.gpus=0.25", "serve.request_seconds=10",
        f"serve.tls_cert_file={tmp_path}/cert.pem", f"serve.tls_key_file={tmp_path}/key.pem",
        'serve.allowed_origins=["https://shop.example"]', "serve.max_queued_requests=64", "decoding.beam=30",
        f"serve.config_file={path}",
    ]  # fmt: skip
    run = load(RunConfig, None, overrides, ROOT / "tiger/configs")
    write_config(model, run.serve, run.decoding)
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 9000)
    assert config.http_options.request_timeout_s == 10
    assert config.http_options.ssl_certfile == str(tmp_path / "cert.pem")
    (app,) = config.applications
    (server,) = app.deployments
    assert server.name == deployment.name
    assert server.user_config == {"model": model.home.uri}
    assert server.autoscaling_config["min_replicas"], server.autoscaling_config["max_replicas"] == (2, 4)
    assert (server.max_queued_requests, server.max_surge_percent) == (64, 100)
    assert (server.ray_actor_options.num_cpus, server.ray_actor_options.num_gpus) == (1, 0.25)
    assert server.ray_actor_options.runtime_env["env_vars"][TOKEN_FILE] == token
    bound = application(app.args)._bound_deployment
    assert bound.init_kwargs == {"token_needed": True, "allowed_origins": ["https://shop.example"]}
    assert bound.init_args[0] == run.decoding.model_dump(mode="json")


def test_a_configuration_that_cannot_be_written_says_why(model: Artifact) -> None:
    with pytest.raises(SecurityError, match="set serve.token_file"):
        write_config(model, ServeConfig(host="0.0.0.0", config_file="x"), DecodingConfig())
    with pytest.raises(ResourceError, match="/none/x.yaml cannot be written: No such file.*set serve.config_file"):
        write_config(model, ServeConfig(config_file="/none/x.yaml"), DecodingConfig())


def test_the_reason_of_a_replica_is_one_line() -> None:
    report = (
        "Traceback (most recent call last):\n  File x\ntiger.core.errors.ArtifactError: runs/model-1: altered\n\nmore"
    )
    assert _reason(report) == "runs/model-1: altered"
    assert _reason("The deployment failed to start.\nValueError: no") == "ValueError: no"
    assert _reason("") == "no reason was given"


def test_the_configuration_knows_the_server() -> None:
    run = load(RunConfig, None, ["serve.port=9000", "serve.resources.max_workers=2"], ROOT / "tiger/configs")
    assert (run.serve.host, run.serve.port, run.serve.resources.max_workers, run.decoding.beam) == (
        "127.0.0.1",
        9000,
        2,
        50,
    )


def test_a_start_that_fails_is_tried_again_and_then_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the proxy may be killed before it is ready."""
    from tiger.on_ray import serve

    failures: list[Exception] = []
    stopped: list[bool] = []

    def start(**_: Any) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(serve.serve, "start", start)
    monkeypatch.setattr(serve, "_stop", stopped.append)
    monkeypatch.setattr(serve.cluster, "log_folder", lambda: "/logs")
    died = ActorDiedError()
    failures += [died, TimeoutError("HTTP proxies not available after 60s.")]
    serve._start(ServeConfig(), {}, False)
    assert (failures, stopped) == ([], [False, False])
    failures += [died] * 3
    with pytest.raises(ResourceError, match="^Ray Serve does not start on 127.0.0.1:8000, tried 3 times: ") as error:
        serve._start(ServeConfig(), {}, False)
    assert "\n" not in str(error.value)
    assert len(stopped) == 5
    failures += [RuntimeError("Failed to bind to address '127.0.0.1:8000'.")] * 2
    with pytest.raises(ResourceError, match="cannot be served: Failed to bind .*; set serve.port"):
        serve._start(ServeConfig(), {}, True)
    assert (len(failures), len(stopped)) == (1, 5)  # another try would not help, and a Serve that ran is left alone
