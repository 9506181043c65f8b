"""Serve a model over HTTP, with a page, until interrupted. Needs `pip install tiger-on-ray[serve]`."""

from __future__ import annotations

from tiger.core.artifacts import Artifact
from tiger.data.grown_catalog import KIND, open_append
from tiger.on_ray.serve import serve_forever, write_config
from tiger.pipeline.train import ensure_model
from tiger.run import RunConfig


def serve(run: RunConfig, model: Artifact) -> Artifact:
    """Serve a model until interrupted; or write the configuration for `serve deploy`, if a file for it is given."""
    semantic_ids = open_append(run.serve.semantic_ids, model, "serve.semantic_ids").get(KIND)
    if run.serve.config_file is not None:
        write_config(model, run.serve, run.decoding, semantic_ids)
        return model
    serve_forever(model, run.serve, run.decoding, run.scale, semantic_ids)
    return model


on_model = serve
SECTIONS_ON_MODEL = ("serve", "decoding", "scale", "tracking")


def job(run: RunConfig) -> Artifact:
    """Serve the model of a configuration; train it first if needed."""
    return serve(run, ensure_model(run))
