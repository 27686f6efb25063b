"""The torch side of `cola demo`, run as `python -m cola_server.demo`: the client itself stays free of torch."""

from cola_server.demo.dialogues import Split, read_dialogues, split_dialogues
from cola_server.demo.evaluation import Loss, evaluate
from cola_server.demo.smollm2 import converted

__all__ = ["Loss", "Split", "converted", "evaluate", "read_dialogues", "split_dialogues"]
