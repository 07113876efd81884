"""A page that shows which experts a text takes, as it comes or as it was recorded."""

from turnout.serve.viewer.recorded import trace_html
from turnout.serve.viewer.routes import viewer_routes
from turnout.serve.viewer.state import Shared

__all__ = ["Shared", "trace_html", "viewer_routes"]
