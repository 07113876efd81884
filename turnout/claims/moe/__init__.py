"""Claims of the family ``moe``: routers of tokens, each seen to do what its paper says, or not."""
