"""Model -> an HTTP server: POST /recommend, until it is interrupted. Needs `pip install tiger-on-ray[serve]`."""

from __future__ import annotations

from jobs.command import command
from jobs.train import whole_training
from tiger.artifacts import Artifact
from tiger.run import RunConfig
from tiger.scale.serve import application, serve_until_stopped

__all__ = ["application"]  # a RayService names it: jobs.serve:application


def serve(run: RunConfig) -> Artifact:
    model = whole_training(run)
    serve_until_stopped(model, run.serve, run.scale)
    return model


if __name__ == "__main__":
    command(__doc__, serve)
