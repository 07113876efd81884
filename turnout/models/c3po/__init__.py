"""Test-time expert re-mixing: a prompt's last token takes experts as it did where the model was right."""

from turnout.models.c3po.c3po import C3PO
from turnout.models.c3po.pathways import Pathways

__all__ = ["C3PO", "Pathways"]
