"""The command line: `tiger VERB`, and the jobs (`python -m jobs.NAME`) that are entry points of `ray job submit`.

A verb is a module of `tiger.pipeline` with a function `job(run, **sections)`, or one of the tools in `TOOLS`. A verb
with a function `on_model(run, model)` also takes the folder of a trained model in place of a configuration.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import logging
import os
import pkgutil
import re
import select
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tiger.pipeline
from tiger.core import logs, tracking
from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import Config, PluginConfig, describe, load, shipped_plugins
from tiger.core.errors import ConfigError, TigerError
from tiger.data.sources.base import DatasetConfig, expand
from tiger.models.base import ModelConfig
from tiger.on_ray import cluster
from tiger.on_ray.failures import RayError, to_tiger_error
from tiger.on_ray.metrics import Gauges
from tiger.run import CONFIGS, RunConfig
from tiger.tokenizers.base import TokenizerConfig

log = logging.getLogger(__name__)

DEFAULT_CONFIG = "sample"

_MODEL_FOLDER = re.compile(r"(^|/)[a-z_]+-[0-9a-f]{8}/?$")

TOOLS = {
    "check": "tiger.evaluation.health",
    "explore": "tiger.report.semantic_ids",
    "export": "tiger.export",
    "report": "tiger.pipeline.report",
    "swap": "tiger.on_ray.swap",
}
"""Verbs that work on finished artifacts, without a configuration: the module's `main(arguments)` runs them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb given by the first argument, and exit with its code.

    Where the reader of stdout ends before the output does, as in `tiger train --help | head`, exit with code 1 and
    without a message.

    Args:
        arguments: command-line arguments without the program's name; None: those of the process.
    """
    try:
        _run_verb(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):  # no error or hangup: it was another pipe or connection
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it again at its exit
        sys.exit(1)


def _run_verb(given: list[str]) -> None:
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return
    verb = given.pop(0).replace("-", "_")
    if verb in TOOLS:
        sys.exit(importlib.import_module(TOOLS[verb]).main(given))
    if verb not in jobs():
        verbs = [*jobs(), *TOOLS]
        near = difflib.get_close_matches(verb, verbs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(verbs)}"
        print(f"error: unknown verb {verb!r}; {hint}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    run_job(verb, given)


def jobs() -> list[str]:
    """Return the verbs that run a stage, sorted: the modules of `tiger.pipeline`."""
    return sorted(module.name for module in pkgutil.iter_modules(tiger.pipeline.__path__) if module.name not in TOOLS)


def run_job(verb: str, arguments: Sequence[str]) -> None:
    """Read the configuration, run one job, and print one JSON object as the last line of stdout.

    Progress and logs go to stderr, and as JSON lines to `ROOT/logs`. An error is one line that says how to fix it, with
    an exit code by kind: 2 configuration, 3 data, 4 artifacts, 5 resources, 6 health, 8 security. With `--debug` the
    traceback is printed first.

    Args:
        verb: a module of `tiger.pipeline`. Its `SECTIONS` are configuration sections in their own files next to the
            configuration: `tuning`, of the verb `tune`, of NAME.toml is in NAME.tune.toml. Overrides of its keys begin
            with `tuning.`.
        arguments: the configuration's name or file, or the folder of a model, overrides `key=value`, `--debug`,
            `--help`.
    """
    debug = "--debug" in arguments
    if debug:
        os.environ[cluster.DEBUG] = "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    logs.configure_console(debug)
    module = importlib.import_module(f"tiger.pipeline.{verb}")
    sections: Mapping[str, type[Config]] = getattr(module, "SECTIONS", {})
    if "--help" in arguments or "-h" in arguments:
        _print_help(verb, module, sections)
        return
    log_file: logs.JsonLinesHandler | None = None
    try:
        name = arguments.pop(0) if arguments and "=" not in arguments[0] else DEFAULT_CONFIG
        cluster.check_environment(os.environ)
        overrides: dict[str, list[str]] = {section: [] for section in ("", *sections)}
        for argument in arguments:
            head = argument.partition(".")[0]
            overrides[head if head in sections else ""].append(argument)
        model = _model(verb, module, name, arguments)
        if model is not None:
            overrides[""].insert(0, f"root={json.dumps(model.home.parent.uri)}")
        defaults = None if model is None else _file_options(module, model, overrides[""])
        run = load(RunConfig, None if model else name, overrides[""], CONFIGS, defaults=defaults)
        if run.embedding.import_path is not None:
            expand([run.embedding.import_path], "embedding.import_path")  # before the first stage, which may take hours
        further = {
            section: _section(name, verb, section, sections[section], overrides[section]) for section in sections
        }
        log_file = logs.JsonLinesHandler(run.root, verb)
        logging.getLogger("tiger").addHandler(log_file)
        with contextlib.ExitStack() as stack:
            _add_sinks(run, verb, log_file.run, stack)
            artifact = module.job(run, **further) if model is None else module.on_model(run, model)
    except (TigerError, RayError) as failure:
        error = to_tiger_error(failure)
        if debug:
            traceback.print_exc()
        if log_file is not None:
            logging.getLogger("tiger").propagate = False  # the console shows the error in the next statement
            log.error("the job ended with exit code %d", error.exit_code, extra={"error": str(error)})
        print(logs.redact(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        if log_file is not None:
            logging.getLogger("tiger").removeHandler(log_file)  # a second job of this process has its own file
            log_file.flush()
    print(json.dumps({"artifact": artifact.folder.uri, **artifact.metrics}), flush=True)


def _model(verb: str, module: ModuleType, name: str, overrides: Sequence[str]) -> Artifact | None:
    """Open the model that a verb is to work on, if `name` is the folder of one.

    Raises:
        ConfigError: the verb takes no model, or an override is of a section that a trained model has settled.
        ArtifactError: it is not a finished model.
    """
    if name.endswith(".toml") or not _MODEL_FOLDER.search(name):
        return None
    if not hasattr(module, "on_model"):
        raise ConfigError(f"tiger {verb} takes a configuration, not the folder of a model; see tiger {verb} --help")
    sections = module.SECTIONS_ON_MODEL
    for override in overrides:
        if override.partition(".")[0] not in sections:
            raise ConfigError(
                f"{override}: {name} is trained, so that only keys of {', '.join(sections)} can be set; give a "
                f"configuration in place of the folder to train another model"
            )
    return open_artifact(name.rstrip("/"), expected_kind="model")


def _file_options(module: ModuleType, model: Artifact, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Return how files of a verb that reads some are read, unless `data.*` keys say otherwise: as the model's were.

    The names of the model's own files are not used; for another kind, placeholders stand for them.
    """
    if "data" not in module.SECTIONS_ON_MODEL:
        return None
    recorded: dict[str, Any] = model.inputs["catalog"].manifest["config"]["data"]
    kinds = [
        text.partition("=")[2].strip("\"' ") for text in overrides if text.partition("=")[0].strip() == "data.kind"
    ]
    if not kinds or kinds[-1] == recorded["kind"]:
        return {"data": recorded}
    names = DatasetConfig.of_kind(kinds[-1], "data.kind").model_fields.keys() & {"items", "interactions"}
    return {"data": {"kind": kinds[-1]} | {name: ["-"] for name in names}}


def _section(name: str, verb: str, section: str, model: type[Config], overrides: list[str]) -> Config:
    """Read a further section of a configuration from the file next to it and from its overrides."""
    file = Path(name) if name.endswith(".toml") else CONFIGS / f"{name}.toml"
    own = [text.removeprefix(f"{section}.") for text in overrides]
    return load(model, str(file.with_suffix(f".{verb}.toml")), own, CONFIGS, prefix=f"{section}.")


def _add_sinks(run: RunConfig, verb: str, run_name: str, stack: contextlib.ExitStack) -> None:
    """Send metrics to Ray's metrics, and to TensorBoard and MLflow if the configuration asks for them."""
    sinks: list[tracking.Sink] = [Gauges(verb)]
    if run.tracking.tensorboard:
        sinks.append(stack.enter_context(tracking.tensorboard(run.tracking.tensorboard, run_name)))
    if run.tracking.mlflow:
        parameters = run.model_dump(mode="json", serialize_as_any=True)
        given = run.tracking.mlflow, run.tracking.experiment
        sinks.append(stack.enter_context(tracking.mlflow(*given, run_name, parameters)))
    stack.enter_context(tracking.recording(*sinks))


# --- help -------------------------------------------------------------------------------------------------------


def _overview() -> str:
    rows = [(name, f"tiger.pipeline.{name}") for name in jobs()] + list(TOOLS.items())
    lines = [f"  {name:<14}{(importlib.import_module(module).__doc__ or '').strip().splitlines()[0]}"
             for name, module in rows]  # fmt: skip
    return "\n".join(
        [
            "usage: tiger VERB [config | model] [key=value ...] [--debug]; see tiger VERB --help\n",
            *lines,
            f"\nconfig is a TOML file or one of: {', '.join(_shipped_configs())} (default: {DEFAULT_CONFIG})",
            "model is the folder of a trained model, for append, evaluate, recommend and serve: runs/model-1a2b3c4d",
        ]
    )


def _shipped_configs() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.toml") if "." not in path.stem)


def _print_help(verb: str, module: ModuleType, sections: Mapping[str, type[Config]]) -> None:
    given = "[config | model]" if hasattr(module, "on_model") else "[config]"
    print(f"{(module.__doc__ or '').strip()}\n\nusage: tiger {verb} {given} [key=value ...] [--debug]\n")
    if hasattr(module, "on_model"):
        settable = ", ".join(module.SECTIONS_ON_MODEL)
        print(f"model is the folder of a trained model; then only keys of {settable} can be set.")
    configs = ", ".join(_shipped_configs())
    print(f"config is a TOML file or one of: {configs} (default: {DEFAULT_CONFIG}). Keys, defaults, meanings:")
    section = ""
    for key, kind, value, meaning in describe(RunConfig):
        head = key.partition(".")[0]
        print(("" if head == section else "\n") + _line(key, kind, value, meaning))
        section = head
    plugins: list[tuple[str, type[PluginConfig]]] = [
        ("data", DatasetConfig),
        ("tokenizer", TokenizerConfig),
        ("model", ModelConfig),
    ]
    for prefix, plugin in plugins:
        for name in shipped_plugins(plugin.plugin_package):
            if name != plugin.default_kind:
                print(f"\nwith {prefix}.kind = {_toml(name)}:")
                for key, kind, value, meaning in describe(plugin.of_kind(name)):
                    print(_line(f"{prefix}.{key}", kind, value, meaning))
    for prefix, config in sections.items():
        print(f"\nin NAME.{verb}.toml next to NAME.toml, where keys are written without {prefix}.:")
        for key, kind, value, meaning in describe(config):
            print(_line(f"{prefix}.{key}", kind, value, meaning))


def _line(key: str, kind: str, value: Any, meaning: str) -> str:
    return f"  {key} = {_toml(value)}  ({kind})\n      {meaning}"


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value, default=lambda _: "required")


if __name__ == "__main__":
    main()
