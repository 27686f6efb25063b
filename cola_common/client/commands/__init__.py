"""The `cola` command's parts, one group of commands a file."""
