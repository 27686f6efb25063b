"""Generated from protos/cola_common/wire by `make protos`; a test checks that it is not stale."""
