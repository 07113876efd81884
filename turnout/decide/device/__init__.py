"""What runs on which device, and when: where experts lie, which flow takes which path."""

from turnout.decide.device import place
from turnout.decide.device.flows import Flows, ecmp, flows

__all__ = ["Flows", "ecmp", "flows", "place"]
