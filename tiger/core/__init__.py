"""What every part uses: errors, configuration, storage, artifacts, logging, progress, devices, precision."""
