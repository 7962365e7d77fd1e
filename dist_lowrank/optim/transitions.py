"""What can happen to moments when the directions change."""

TRANSITIONS = ("move", "reset", "keep", "move_variance")
# move: they follow their directions: first moments by the product of the old and the new basis, second moments by its
#   element-wise square. For columns of one dictionary that is exact: a column keeps its moments, a new one has none.
# reset: all zero.
# keep: slot j keeps its moments whatever direction it now holds, as the published code of several methods does.
# move_variance: first moments move; of second ones the variance does, and the square of the moved mean is added back.
