"""Jobs: `python -m jobs.NAME [config] [key=value ...]`, on a laptop or through `ray job submit`."""
