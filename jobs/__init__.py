"""One short entrypoint per stage, for `ray job submit -- python -m jobs.<stage>`."""
