"""The client, async and blocking.

face      what callers use          session   ask until answered
holding   a worker's leases         spool     numbered batches of spans
waiting   for rollouts to end       blocking  the same as face, synchronous
"""

from lightning_bus.client.blocking import BlockingClient
from lightning_bus.client.face import Client, Submitted
from lightning_bus.client.holding import Leases

__all__ = ["BlockingClient", "Client", "Leases", "Submitted"]
