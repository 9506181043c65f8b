"""The command line that all jobs share."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.exceptions

from tiger import logs, tracking
from tiger.artifacts import Artifact
from tiger.config import Config, PluginConfig, describe, load, shipped_plugins
from tiger.datasets import DatasetConfig, expand
from tiger.errors import ResourceError, TigerError, last_line
from tiger.run import RunConfig
from tiger.scale import cluster
from tiger.scale.metrics import Gauges
from tiger.tokenizers import TokenizerConfig

log = logging.getLogger("jobs.command")

CONFIGS = Path(__file__).parent / "configs"


def command(
    doc: str,
    stage: Callable[..., Artifact],
    default: str = "sample",
    sections: Mapping[str, type[Config]] | None = None,
) -> None:
    """Runs one job: reads the configuration, calls `stage`, prints one JSON object as the last line of stdout.

    Args:
        stage: called with the `RunConfig`, and with every further section by its name.
        sections: further sections, with a file of their own next to the configuration: that of `search` and NAME.toml
            is NAME.search.toml. Overrides of its keys begin with `search.`.

    Progress and logs go to stderr, and as JSON lines to `ROOT/logs`. An error with a cure is one line there, and the
    exit code says its kind: 2 configuration, 3 data, 4 artifacts, 5 resources, 6 health, 8 security. With
    `--debug` the traceback comes first.
    """
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        os.environ[cluster.DEBUG] = "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    logs.to_console(debug)
    written: logs.JsonLines | None = None
    sections = sections or {}
    try:
        if "--help" in arguments or "-h" in arguments:
            _help(doc, default, sections)
            return
        name = arguments.pop(0) if arguments and "=" not in arguments[0] else default
        cluster.require_safe(os.environ)
        own: dict[str, list[str]] = {section: [] for section in ("", *sections)}
        for argument in arguments:
            head = argument.partition(".")[0]
            own[head if head in sections else ""].append(argument)
        run = load(RunConfig, name, own[""], CONFIGS)
        if run.embedding.vectors is not None:
            expand([run.embedding.vectors], "embedding.vectors")  # before the first stage, which may take hours
        further = {section: _section(name, section, sections[section], own[section]) for section in sections}
        written = logs.JsonLines(run.root, _job_name())
        logging.getLogger("tiger").addHandler(written)
        logging.getLogger("jobs").addHandler(written)
        with contextlib.ExitStack() as watching:
            track(run, written.run, watching)
            artifact = stage(run, **further)
    except (TigerError, ray.exceptions.RayError) as failure:
        error = failure if isinstance(failure, TigerError) else _of_ray(failure)
        if debug:
            traceback.print_exc()
        if written is not None:
            logging.getLogger("jobs").propagate = False  # it is on the console already, in the next line
            log.error("the job ended with exit code %d", error.exit_code, extra={"error": str(error)})
        print(logs.redact(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        if written is not None:
            written.flush()
    print(json.dumps({"artifact": artifact.folder.uri, **artifact.figures}), flush=True)


def _section(name: str, section: str, model: type[Config], overrides: list[str]) -> Config:
    """Return a further section of a configuration, from the file next to it and from its overrides."""
    file = Path(name) if name.endswith(".toml") else CONFIGS / f"{name}.toml"
    own = [text.removeprefix(f"{section}.") for text in overrides]
    return load(model, str(file.with_suffix(f".{section}.toml")), own, CONFIGS, prefix=f"{section}.")


def _of_ray(error: Exception) -> TigerError:
    """Return an error of Ray's as one line that says where more is to be found."""
    return ResourceError(
        f"Ray: {last_line(error)} (--debug shows the traceback; {cluster.log_folder()} has Ray's logs)"
    )


def track(run: RunConfig, name: str, watching: contextlib.ExitStack) -> None:
    """Figures go to Ray's metrics, and to TensorBoard and MLflow where the configuration asks for them."""
    sinks: list[tracking.Sink] = [Gauges(_job_name())]
    if run.tracking.tensorboard:
        sinks.append(watching.enter_context(tracking.tensorboard(run.tracking.tensorboard, name)))
    if run.tracking.mlflow:
        parameters = run.model_dump(mode="json", serialize_as_any=True)
        given = run.tracking.mlflow, run.tracking.experiment
        sinks.append(watching.enter_context(tracking.mlflow(*given, name, parameters)))
    watching.enter_context(tracking.recording(*sinks))


def _job_name() -> str:
    """`pipeline` for `python -m jobs.pipeline`."""
    return Path(sys.argv[0]).stem


def _help(doc: str, default: str, sections: Mapping[str, type[Config]]) -> None:
    names = sorted(path.stem for path in CONFIGS.glob("*.toml") if "." not in path.stem)
    print(f"{doc.strip()}\n\nusage: python -m jobs.NAME [config] [key=value ...] [--debug]\n")
    print(f"config is a TOML file or one of: {', '.join(names)} (default: {default}). Keys, defaults, meanings:")
    section = ""
    for key, kind, value, meaning in describe(RunConfig):
        head = key.partition(".")[0]
        print(("" if head == section else "\n") + _line(key, kind, value, meaning))
        section = head
    plugins: list[tuple[str, type[PluginConfig]]] = [("data", DatasetConfig), ("tokenizer", TokenizerConfig)]
    for prefix, plugin in plugins:
        for name in shipped_plugins(plugin.plugin_package):
            if name != plugin.default_kind:
                print(f"\nwith {prefix}.kind = {_toml(name)}:")
                for key, kind, value, meaning in describe(plugin.of_kind(name)):
                    print(_line(f"{prefix}.{key}", kind, value, meaning))
    for prefix, config in sections.items():
        print(f"\nin NAME.{prefix}.toml next to NAME.toml, where keys stand without {prefix}.:")
        for key, kind, value, meaning in describe(config):
            print(_line(f"{prefix}.{key}", kind, value, meaning))


def _line(key: str, kind: str, value: Any, meaning: str) -> str:
    return f"  {key} = {_toml(value)}  ({kind})\n      {meaning}"


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value, default=lambda _: "to be given")
