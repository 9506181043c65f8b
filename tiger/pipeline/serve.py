"""Serve a model over HTTP (POST /recommend) until interrupted. Needs `pip install tiger-on-ray[serve]`."""

from __future__ import annotations

from tiger.core.artifacts import Artifact
from tiger.on_ray.serve import serve_forever
from tiger.pipeline.train import ensure_model
from tiger.run import RunConfig


def serve(run: RunConfig, model: Artifact) -> Artifact:
    """Serve a model until interrupted."""
    serve_forever(model, run.serve, run.decoding, run.scale)
    return model


on_model = serve
SECTIONS_ON_MODEL = ("serve", "decoding", "scale", "tracking")


def job(run: RunConfig) -> Artifact:
    """Serve the model of a configuration; train it first if needed."""
    return serve(run, ensure_model(run))
