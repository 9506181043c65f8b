"""The only place, beside the jobs, that knows Ray.

Importing it settles how Ray behaves, which Ray reads from the environment when it is imported itself. What a user has
set stays.
"""

import os

for _name, _value in {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else every driver under `uv run` ships the folder and its workers start uv
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # our own progress has a rate and an ETA, and one line at a time
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often reports are collected; the default of 2 s delays each one
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a busy machine takes longer than the default of 60 s
    "RAY_AIR_NEW_OUTPUT": "0",  # the older output of Tune can be silent; the search has a table of its own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # every look three times more, in files that are deleted with the sweep
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the behavior of later versions of Ray; silences its warning
    "TOKENIZERS_PARALLELISM": "false",  # workers have their own cores; silences a warning after forks
}.items():
    os.environ.setdefault(_name, _value)
