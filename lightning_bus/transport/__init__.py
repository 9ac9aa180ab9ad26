"""Raw ZeroMQ sockets behind a small anyio face, encrypted and authenticated when there are keys.

`bind_router` is the broker's side and `connect_dealer` a client's. Without keys the transport is plain, and refuses to
listen beyond this machine. With keys every connection is CURVE: the broker lets in who holds the secret of a key on
its ring (`zap`), every message tells whose it is, and what comes under another key's name goes no further (`router`).
"""

from lightning_bus.transport.channel import Channel
from lightning_bus.transport.dealer import ConnectKey, Dealer, connect_dealer, producer_name
from lightning_bus.transport.router import Arrived, Router, bind_router
from lightning_bus.transport.zap import Holder, Ring

__all__ = [
    "Arrived", "Channel", "ConnectKey", "Dealer", "Holder", "Ring", "Router",
    "bind_router", "connect_dealer", "producer_name",
]  # fmt: skip
