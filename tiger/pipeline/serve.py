"""Serve a model over HTTP (POST /recommend) until interrupted. Needs `pip install tiger-on-ray[serve]`."""

from __future__ import annotations

from tiger.core.artifacts import Artifact
from tiger.on_ray.serve import serve_forever
from tiger.pipeline.train import ensure_model
from tiger.run import RunConfig


def serve(run: RunConfig) -> Artifact:
    """Train the model if needed and serve it until interrupted."""
    model = ensure_model(run)
    serve_forever(model, run.serve, run.scale)
    return model


job = serve
