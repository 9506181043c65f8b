"""Ray integration, the only package that imports Ray.

Importing it sets defaults for environment variables that Ray reads when it is imported, and PyTorch at its first
allocation. Variables that are already set are not changed.
"""

import os

for _name, _value in {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else a driver under `uv run` uploads the folder, and its workers start uv
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # we log our own progress, with a rate and an ETA
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # polling interval of reports; the default of 2 s delays each one
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a busy machine takes longer than the default of 60 s
    "RAY_AIR_NEW_OUTPUT": "0",  # the older output of Tune can be disabled; the sweep logs its own table
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they write results to files that we delete
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the behavior of later versions of Ray; silences its warning
    "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for PyTorch: training with 1 million item vectors takes x 0.6 of the time
    "TOKENIZERS_PARALLELISM": "false",  # workers have their own cores; silences a warning after forks
}.items():
    os.environ.setdefault(_name, _value)
