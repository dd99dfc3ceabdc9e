"""`orthant scale`: the same run at several sizes, and what their times say."""
