"""Pages and drawings: one self-contained html file for each kind of result, which opens without a network."""

from turnout.show.adaptation import AdaptationData, adaptation_html
from turnout.show.conversion import ConversionData, conversion_html
from turnout.show.run import report_html
from turnout.show.serving import ServingPoint, serving_html
from turnout.show.timeline import timeline_html, timeline_svg, timeline_text

__all__ = [
    "AdaptationData",
    "ConversionData",
    "ServingPoint",
    "adaptation_html",
    "conversion_html",
    "report_html",
    "serving_html",
    "timeline_html",
    "timeline_svg",
    "timeline_text",
]
