"""What all of these are made of."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Does not change, and has no other fields than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
