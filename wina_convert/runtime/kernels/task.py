"""What a call tells the compiled CPU kernels: where things are and how large, and how its scratch memory is divided."""

# Addresses and sizes of a product, and how many products the call has: int64 each.
FIELDS = ("x", "weight", "tau", "bias", "y", "scratch", "rows", "n_in", "n_out", "count")
# The same of the attention of one token a sequence; strides are bytes from one head to the next, `room` those of a thread.
ATTENTION = (
    "query",
    "key",
    "value",
    "y",
    "scratch",
    "room",
    "heads",
    "keys",
    "size",
    "width",
    "key_stride",
    "value_stride",
)
AHEAD = 16  # rows of the weight that are fetched ahead
LINE = 16  # float32 in a cache line
WIDEST = 32  # columns, at most, whose sums are in registers at a time
