"""The daemon on a cheap machine: owns shards of jobs and turns captures into deltas."""
