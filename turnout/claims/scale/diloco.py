"""Claim: replicas that meet every few dozen steps learn as if they met at every one, when the outer step has momentum."""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.digits import CLASSES, SIDE, digits
from turnout.train.local import DiLoCo

_REPLICAS, _EVERY, _STEPS, _BATCH, _RATE = 4, 25, 500, 32, 1e-3
_DELAY, _FRAGMENTS, _MIX = 3, 5, 0.5
