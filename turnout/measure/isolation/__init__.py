"""Does what a network answers one user depend on the others in its batch? One probe a file; ``audit`` runs them."""

from turnout.measure.isolation.audit import audit
from turnout.measure.isolation.finding import Finding, Isolation

__all__ = ["Finding", "Isolation", "audit"]
