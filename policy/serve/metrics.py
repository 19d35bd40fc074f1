"""What the server counts, for Prometheus: requests by outcome, how long plans took and waited, connections."""
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)


class Metrics:
    """One registry a server, so that several live in one process."""

    def __init__(self, model_id: str):
        self.registry = CollectorRegistry()
        self.requests = Counter("dipole_requests", "Messages of clients by outcome: ok, or the code of the error", ["code"], registry=self.registry)
        self.plan_ms = Histogram("dipole_plan_ms", "Time of one plan", buckets=BUCKETS, registry=self.registry)
        self.queue_ms = Histogram("dipole_queue_ms", "Time a request waited for the planner", buckets=BUCKETS, registry=self.registry)
        self.connections = Gauge("dipole_connections", "Open connections", ["dialect"], registry=self.registry)
        self.refused = Counter("dipole_refused_connections", "Connections that were not let in", ["why"], registry=self.registry)
        Gauge("dipole_model", "The model that is served", ["model_id"], registry=self.registry).labels(model_id).set(1)

    def planned(self, plan_ms: float, queue_ms: float) -> None:
        self.requests.labels("ok").inc()
        self.plan_ms.observe(plan_ms)
        self.queue_ms.observe(queue_ms)

    def text(self) -> str:
        return generate_latest(self.registry).decode()
