"""Code shared by all packages: errors, configuration, storage, artifacts, logging, progress, devices, precision."""
