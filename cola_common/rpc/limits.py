"""Limits of channels, servers and streams, each with its reason."""

CHUNK_BYTES = 2 << 20
"""Tensor bytes in one envelope. Each envelope costs about as much as copying half a MiB, so larger is better, up to
2 MiB: captures of packed small sites then fit in one, and from 4 MiB on the event loop stalls.
"""

MAX_MESSAGE_BYTES = 4 << 20
"""gRPC's own default. Chunks are half of it: the rest is room for the headers of the largest Assign."""

MAX_PAYLOAD_BYTES = 64 << 20
"""What a stream takes for one message's tensors where nobody says what to expect."""

_LIVENESS = [
    # An idle connection is asked every 10 s whether it lives, and has 5 s to answer: a peer that is frozen or cut off
    # is noticed within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Without it a stopped peer was noticed after 70 s: gRPC waits for its own, slower, ping first.
    ("grpc.http2.ping_timeout_ms", 5_000),
    # A channel without a call is still a client's or a worker's way in: keep it checked.
    ("grpc.keepalive_permit_without_calls", 1),
    # gRPC stops after two pings without data, which is what an idle worker's connection looks like.
    ("grpc.http2.max_pings_without_data", 0),
]

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_LIVENESS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Retries are the caller's, with idempotency keys: gRPC's own would hide a broken connection.
    ("grpc.enable_retries", 0),
    # gRPC waits up to two minutes between its attempts to connect; a server that is back is to be found sooner.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_LIVENESS,
    # The clients' pings come every 10 s; with the default of 5 minutes the server would end them as "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # gRPC's compression runs at 29 MB/s and lets small messages unfold into large ones: nothing but identity (bit 0).
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Two servers on one port would share its connections silently; the second is to fail.
    ("grpc.so_reuseport", 0),
]
