"""What every other room builds on: errors, files, arrays on disk, devices, processes."""
