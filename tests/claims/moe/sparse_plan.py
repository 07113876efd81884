"""A column may have any number of entries."""

from broken import Case

from turnout.solve import transport_sparse

projected = transport_sparse.sparse_projection
CASE = Case(
    lambda m: m.setattr(transport_sparse, "sparse_projection", lambda x_MN, k: projected(x_MN, len(x_MN))),
    pairs={"over": "over, any"},
)
