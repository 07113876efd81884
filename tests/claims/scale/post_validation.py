"""A step that was done too early stays done."""

from broken import Case

from turnout.claims.scale.post_validation import stubborn
from turnout.train.post_validation import PostValidation

CASE = Case(lambda patch: patch.setattr(PostValidation, "validate", stubborn))
