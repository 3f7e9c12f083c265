"""Several processes: FSDP, and sequence parallelism without xfuser."""
